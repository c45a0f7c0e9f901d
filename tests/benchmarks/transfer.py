"""Time of a push of 100 MB and of the weights' way back, by lane: `python -m tests.benchmarks.transfer`.

Server and worker are two processes without Ray. A round is a push, its receipt, and the new weights in the worker's
memory. It is compared with the time that one core needs for the same work in plain NumPy: copy the gradient out, take
the step (w -= η·g, as two passes), copy the weights in. A second comparison sends the same bytes each way over a bare
socket, without any arithmetic.
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

LANES: dict[str, tuple[LaneKind, bool]] = {"shm": ("shm", False), "tcp": ("tcp", False), "authenticated": ("tcp", True)}
RATE = np.float32(1e-3)

Round = Callable[[], None]


class InOneProcess:
    """The work of one round in plain NumPy, on one core.

    Args:
        size: values of the weights.
    """

    def __init__(self, size: int) -> None:
        self.gradient, self.sent, self.weights, self.scratch, self.received = np.zeros((5, size), np.float32)

    def round(self) -> None:
        """Copy the gradient out, take the step, copy the weights in."""
        np.copyto(self.sent, self.gradient)
        np.multiply(self.sent, RATE, out=self.scratch)
        np.subtract(self.weights, self.scratch, out=self.weights)
        np.copyto(self.received, self.weights)


def main() -> int:
    """Measure, print the table, write the document."""
    made = parser("transfer", __doc__, repeats=5)
    made.add_argument("--size", type=int, default=25_000_000, help="values of the weights, 4 bytes each")
    made.add_argument("--rounds", type=int, default=7, help="rounds of each kind in a turn (default: %(default)s)")
    arguments = made.parse_args()
    begin()
    turns = _turns(arguments)
    return conclude("seconds of a round", findings(turns, arguments.size), arguments, turns)


def findings(turns: Mapping[str, Sequence[float]], size: int) -> list[Finding]:
    """Return the ratio of each kind of round to the plain NumPy round.

    Args:
        turns: seconds of a round in each turn, by kind.
        size: values of the weights.
    """
    plain = turns["plain"]
    large = f"{4e-6 * size:g} MB"
    return [
        ratio(f"push + weights of {large} on shm ÷ copy, step, copy in NumPy", turns["shm"], plain, at_most=1.5),
        ratio(f"push + weights of {large} on tcp ÷ copy, step, copy in NumPy", turns["tcp"], plain, at_most=6.0),
        ratio(f"push + weights of {large} on tcp: authenticated ÷ not", turns["authenticated"], turns["tcp"]),
        ratio(f"{large} each way on a bare socket ÷ copy, step, copy in NumPy", turns["loopback"], plain),
    ]


def _turns(arguments: Namespace) -> dict[str, list[float]]:
    """Return the median seconds of a round, by kind and turn."""
    size = arguments.size
    with _loopback(4 * size) as loopback, ExitStack() as stack:
        rounds: dict[str, Round] = {"plain": InOneProcess(size).round, "loopback": loopback}
        for name, (kind, authenticates) in LANES.items():
            server = stack.enter_context(BareServer(size, 1, authenticates))
            worker = BareWorker(kind, 0, size, server.address, authenticates)
            stack.callback(worker.close)
            rounds[name] = worker.push
        for once in rounds.values():
            once()  # touches every page
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
    """Yield a function that sends `size` bytes to another process and receives them back."""
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
    """Fill a buffer from a stream. Return False if the other end closed the connection."""
    got = 0
    while got < len(into):
        count = stream.recv_into(into[got:])
        if not count:
            return False
        got += count
    return True


if __name__ == "__main__":
    sys.exit(main())
