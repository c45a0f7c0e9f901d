"""Pushes of 10 KB per second through one server: `python -m tests.benchmarks.small`.

Eight workers, which are processes without Ray, push as fast as they can over each lane. Every push is a new batch; the
server applies it and answers with a receipt and the new weights. The server counts the pushes.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from multiprocessing.synchronize import Barrier
from statistics import median

from psgd_workers.transport.handshake import Address
from psgd_workers.transport.lane import LaneKind
from tests.benchmarks.bare import BareServer, BareWorker, Mark, Stop, stop_flag
from tests.benchmarks.command import begin, conclude, parser
from tests.benchmarks.findings import Finding
from tests.benchmarks.process_group import SPAWN, process_group

__all__ = ["findings", "main"]

SIZE = 2500  # values of the weights, 4 bytes each
TARGETS: dict[LaneKind, int] = {"shm": 40_000, "tcp": 15_000}
START_S = 120.0  # time limit for the start of the processes
SETTLE_S = 0.5
KINDS: tuple[LaneKind, ...] = ("shm", "tcp")


def main() -> int:
    """Measure, print the table, write the document."""
    made = parser("small", __doc__)
    made.add_argument("--seconds", type=float, default=5.0, help="seconds measured in each turn (default: %(default)s)")
    made.add_argument("--workers", type=int, default=8, help="processes that push (default: %(default)s)")
    arguments = made.parse_args()
    begin()
    turns: dict[LaneKind, list[Mark]] = {kind: [] for kind in KINDS}
    for _ in range(arguments.repeats):
        for kind, marks in turns.items():
            marks.append(_measured(kind, arguments))
    runs = {kind: [mark._asdict() for mark in marks] for kind, marks in turns.items()}
    return conclude("pushes of 10 KB", findings(turns), arguments, runs)


def findings(turns: Mapping[LaneKind, Sequence[Mark]]) -> list[Finding]:
    """Return the figures of each lane.

    Args:
        turns: progress of the server in each turn, by lane.
    """
    found = []
    for kind, marks in turns.items():
        rates = tuple(mark.rate for mark in marks)
        costs = tuple(mark.cpu_us for mark in marks)
        at_least = TARGETS.get(kind)
        found += [
            Finding(f"pushes/s of 10 KB through one server on {kind}", median(rates), "/s", at_least, turns=rates),
            Finding(f"the server's CPU time for each push on {kind}", median(costs), "µs", turns=costs),
        ]
    return found


def _measured(kind: LaneKind, arguments: Namespace) -> Mark:
    """Return the server's progress while all workers push."""
    workers = arguments.workers
    stop = stop_flag()
    start = SPAWN.Barrier(workers + 1)
    with (
        BareServer(SIZE, workers) as server,
        process_group(workers, _push, kind, server.address, start, stop) as answers,
    ):
        start.wait(START_S)
        time.sleep(SETTLE_S)
        before = server.mark()
        time.sleep(arguments.seconds)
        after = server.mark()
        stop.value = True
        pushed = sum(answers())
        applied = server.mark().applied
    assert applied == pushed, f"{pushed} pushes were sent, but {applied} were applied"
    return after.since(before)


def _push(rank: int, kind: LaneKind, address: Address, start: Barrier, stop: Stop) -> int:
    """Push until `stop` is set, and return the number of pushes."""
    worker = BareWorker(kind, rank, SIZE, address)
    pushed = 0
    start.wait(START_S)
    while not stop.value:
        worker.push()
        pushed += 1
    worker.close()
    return pushed


if __name__ == "__main__":
    sys.exit(main())
