"""More servers, and more workers on one server: `python -m tests.benchmarks.servers`.

The first part compares two servers with one, on one machine, in the setting of `throughput`. The second part measures
the server's CPU time for a push with 4 and with 64 workers, for a small partition and for the one of `throughput`. The
workers are processes without Ray on the shm lane. They mostly sleep, so that all of them together push at the same
rate. The sleeps are exponential, so that pushes arrive as a Poisson process.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from multiprocessing.synchronize import Barrier
from statistics import median

import numpy as np
from rich.console import Console

from psgd_workers.transport.handshake import Address
from tests.benchmarks.bare import BareServer, BareWorker, Mark, Stop, stop_flag
from tests.benchmarks.command import begin, conclude, parser
from tests.benchmarks.contender import Failure, run_contender
from tests.benchmarks.findings import Finding, ratio
from tests.benchmarks.process_group import SPAWN, process_group

__all__ = ["findings", "main"]

SERVERS = (1, 2)
FEW = 4  # workers
MANY = 64
SIZES = {"small": 2500, "dense": 235_146}  # values of the weights, 4 bytes each
PUSHES_PER_S = 200.0  # by all workers together
START_S = 300.0  # time limit for the start of 64 processes
SETTLE_S = 5.0  # each of 64 workers has pushed several times then, and its thread has found its processor

Marks = Mapping[str, Mapping[int, list[Mark]]]


def main() -> int:
    """Measure, print the table, write the document."""
    made = parser("servers", __doc__)
    made.add_argument("--seconds", type=float, default=6.0, help="seconds measured in each run with one or two servers")
    made.add_argument("--worker-seconds", type=float, default=20.0, help="seconds measured with each number of workers")
    made.add_argument("--limit", type=float, default=120.0, help="time limit of a run, in seconds")
    arguments = made.parse_args()
    begin()
    rates: dict[int, list[float]] = {servers: [] for servers in SERVERS}
    marks: Marks = {size: {FEW: [], MANY: []} for size in SIZES}
    for _ in range(arguments.repeats):
        for servers in SERVERS:
            rates[servers] += _rate(servers, arguments)
        for size, by_workers in marks.items():
            for workers, of in by_workers.items():
                of.append(_measured(SIZES[size], workers, arguments))
    runs = {"servers": rates, "workers": marks}
    return conclude("servers and workers", findings(rates, marks), arguments, runs)


def findings(rates: Mapping[int, Sequence[float]], marks: Marks) -> list[Finding]:
    """Return the figures.

    Args:
        rates: gradients per second in each turn, by number of servers.
        marks: progress of the one server in each turn, by size of the partition and number of workers.
    """
    found = [ratio("gradients/s with 2 servers on one node ÷ with 1", rates[2], rates[1], at_least=0.95)]
    for size, by_workers in marks.items():
        costs = {workers: tuple(mark.cpu_us for mark in of) for workers, of in by_workers.items()}
        name = f"the server's CPU time for a {size} push"
        found.append(ratio(f"{name}, {MANY} workers ÷ {FEW}", costs[MANY], costs[FEW], at_most=1.1))
        for workers, of in costs.items():
            found.append(Finding(f"{name}, {workers} workers", median(of), "µs", turns=of))
    return found


def _rate(servers: int, arguments: Namespace) -> list[float]:
    """Return the gradients per second of one run, in a list; an empty list if the run failed."""
    settings = ("--set", f"scaling.servers={servers}")
    outcome = run_contender("psgd_job", arguments.seconds, arguments.limit, settings)
    if isinstance(outcome, Failure):
        Console().print(f"{servers} servers failed: {outcome.error}", markup=False, highlight=False)
        return []
    return [outcome.updates_per_s]


def _measured(size: int, workers: int, arguments: Namespace) -> Mark:
    """Return the server's progress while this number of workers push now and then."""
    start = SPAWN.Barrier(workers + 1)
    stop = stop_flag()
    with (
        BareServer(size, workers) as server,
        process_group(workers, _push, size, workers / PUSHES_PER_S, server.address, start, stop) as answers,
    ):
        start.wait(START_S)
        time.sleep(SETTLE_S)
        before = server.mark()
        time.sleep(arguments.worker_seconds)
        found = server.mark().since(before)
        stop.value = True
        answers()
    return found


def _push(rank: int, size: int, mean_s: float, address: Address, start: Barrier, stop: Stop) -> None:
    worker = BareWorker("shm", rank, size, address)
    random = np.random.default_rng(rank)
    start.wait(START_S)
    while not stop.value:
        time.sleep(random.exponential(mean_s))
        worker.push()
    worker.close()


if __name__ == "__main__":
    sys.exit(main())
