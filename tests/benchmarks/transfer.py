"""A push of 100 MB and the weights' way back, over the same in one process: `python -m tests.benchmarks.transfer`.

A server and a worker, two processes without Ray, over each lane. A round is a push, its receipt, and the new weights in
the worker's memory. The measure for it is what one core needs for the least that is to be done, in plain NumPy: copy
the gradient out, step by it (w -= η·g, as two passes), copy the weights in. Beside it: how long so many bytes take each
way over a bare socket, without any arithmetic.
"""

from __future__ import annotations

import socket
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median
from time import perf_counter

import numpy as np

from psgd_workers.transport.lane import LaneKind
from tests.benchmarks.bare import HOST, BareServer, BareWorker
from tests.benchmarks.command import begin, conclude, parser
from tests.benchmarks.findings import Finding, ratio
from tests.benchmarks.process_group import process_group

__all__ = ["InOneProcess", "findings", "main"]

KINDS: tuple[LaneKind, ...] = ("shm", "tcp")
RATE = np.float32(1e-3)

Round = Callable[[], None]


class InOneProcess:
    """The least that is to be done, on one core.

    Args:
        size: values of the weights.
    """

    def __init__(self, size: int) -> None:
        self.gradient, self.sent, self.weights, self.scratch, self.came = np.zeros((5, size), np.float32)

    def round(self) -> None:
        """Out, step, in."""
        np.copyto(self.sent, self.gradient)
        np.multiply(self.sent, RATE, out=self.scratch)
        np.subtract(self.weights, self.scratch, out=self.weights)
        np.copyto(self.came, self.weights)


def main() -> int:
    """Measure, print the table, write the document."""
    made = parser("transfer", __doc__, repeats=5)
    made.add_argument("--size", type=int, default=25_000_000, help="values of the weights, 4 bytes each")
    made.add_argument("--rounds", type=int, default=7, help="of each kind in a turn")
    arguments = made.parse_args()
    begin()
    turns = _turns(arguments)
    return conclude("seconds of a round", findings(turns, arguments.size), arguments, turns)


def findings(turns: Mapping[str, Sequence[float]], size: int) -> list[Finding]:
    """Every kind over the plain work.

    Args:
        turns: seconds of a round of each kind, by turn.
        size: values of the weights.
    """
    plain = turns["plain"]
    large = f"{4e-6 * size:g} MB"
    return [
        ratio(f"push + weights of {large} on shm ÷ copy, step, copy in NumPy", turns["shm"], plain, at_most=1.5),
        ratio(f"push + weights of {large} on tcp ÷ copy, step, copy in NumPy", turns["tcp"], plain, at_most=6.0),
        ratio(f"{large} each way on a bare socket ÷ copy, step, copy in NumPy", turns["loopback"], plain),
    ]


def _turns(arguments: Namespace) -> dict[str, list[float]]:
    """Median seconds of a round, by kind and turn."""
    size = arguments.size
    with BareServer(size, len(KINDS)) as server, _loopback(4 * size) as loopback, ExitStack() as stack:
        workers = {kind: BareWorker(kind, rank, size, server.address) for rank, kind in enumerate(KINDS)}
        for worker in workers.values():
            stack.callback(worker.close)
        rounds: dict[str, Round] = {kind: worker.push for kind, worker in workers.items()}
        rounds |= {"plain": InOneProcess(size).round, "loopback": loopback}
        for once in rounds.values():
            once()  # every page is touched
        found: dict[str, list[float]] = {name: [] for name in rounds}
        for _ in range(arguments.repeats):
            for name, round_ in rounds.items():
                found[name].append(median(_seconds(round_) for _ in range(arguments.rounds)))
    return found


def _seconds(round_: Round) -> float:
    began = perf_counter()
    round_()
    return perf_counter() - began


@contextmanager
def _loopback(size: int) -> Iterator[Round]:
    """Yields what sends so many bytes to another process and receives as many from it."""
    data = memoryview(bytearray(size))
    with socket.create_server((HOST, 0)) as listening, process_group(1, _echo, listening.getsockname()[1], size):
        stream, _ = listening.accept()
        with stream:

            def exchange() -> None:
                stream.sendall(data)
                _receive(stream, data)

            yield exchange


def _echo(rank: int, port: int, size: int) -> None:
    data = memoryview(bytearray(size))
    with socket.create_connection((HOST, port)) as stream:
        while _receive(stream, data):
            stream.sendall(data)


def _receive(stream: socket.socket, into: memoryview) -> bool:
    """Fill it; false if the other end has hung up."""
    got = 0
    while got < len(into):
        count = stream.recv_into(into[got:])
        if not count:
            return False
        got += count
    return True


if __name__ == "__main__":
    sys.exit(main())
