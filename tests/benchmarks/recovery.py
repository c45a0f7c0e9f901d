"""Cost of the deaths of workers and servers: `python -m tests.benchmarks.recovery`.

Four workers on a real Ray sleep 20 ms for each batch. There are three kinds of runs: undisturbed; with a random worker
killed every five seconds; and with the server killed every eight seconds. A worker has recovered when its successor is
up, a server when its successor has sent its first report; both times begin when the driver sees the death. A batch
counts as computed again if it was pushed and the server had it already. The batch in a dead worker's hands is lost,
too; it is not measured, but counted as one.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from subprocess import Popen
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from tests.benchmarks.command import begin, conclude, parser
from tests.benchmarks.findings import Finding, ratio
from tests.benchmarks.mnist import mnist_path
from tests.benchmarks.peers.psgd_job import check_lanes, events, result, training
from tests.benchmarks.processes import descendants, title
from tests.benchmarks.setting import LEARNING_RATE, SIZES

__all__ = ["Recovery", "findings", "main", "recovered"]

WORKERS = 4
SLEEP_S = 0.02
BATCH_SIZE = 8  # makes an epoch of 38 s, longer than any run here
HIDDEN = 32
WORKER = "ray::WorkerActor"
SERVER = "ray::ServerActor"
EVERY_S = {WORKER: 5.0, SERVER: 8.0}
POLL_S = 0.05


class Recovery(NamedTuple):
    """The outcome of one run."""

    rate: float  # examples per second of training that are in the final weights
    kills: int  # deaths that the driver saw
    again: float  # batches computed again
    seconds: tuple[float, ...]  # duration of each recovery


def main() -> int:
    """Measure, print the table, write the document."""
    made = parser("recovery", __doc__)
    made.add_argument(
        "--seconds", type=float, default=27.0, help="seconds of training in each run (default: %(default)s)"
    )
    arguments = made.parse_args()
    begin()
    turns: dict[str, list[Recovery]] = {"undisturbed": [], WORKER: [], SERVER: []}
    for turn in range(arguments.repeats):
        for victim, measured in turns.items():
            measured.append(_measured(victim, turn, arguments))
            print(f"{victim}: {measured[-1]}", flush=True)
    runs = {victim: [run._asdict() for run in of] for victim, of in turns.items()}
    return conclude("cost of deaths", findings(turns), arguments, runs)


def findings(turns: Mapping[str, Sequence[Recovery]]) -> list[Finding]:
    """Return the figures.

    Args:
        turns: runs by victim, one for each turn.
    """
    even = turns["undisturbed"]
    workers = turns[WORKER]
    servers = turns[SERVER]
    rates = [run.rate for run in even]
    again = tuple(run.again / run.kills for run in workers if run.kills)
    return [
        ratio("updates/s with one of 4 workers killed every 5 s ÷ undisturbed", _rates(workers), rates, at_least=0.8),
        Finding(
            "batches computed again per killed worker, with the one in its hands", _median(again), "", None, 1.0, again
        ),
        _seconds("a worker's successor is up after", workers, 3.0),
        _seconds("a server's successor has reported after", servers, 5.0),
        ratio("updates/s with the server killed every 8 s ÷ undisturbed", _rates(servers), rates),
    ]


def _rates(runs: Sequence[Recovery]) -> list[float]:
    return [run.rate for run in runs]


def _seconds(measure: str, runs: Sequence[Recovery], at_most: float) -> Finding:
    found = tuple(seconds for run in runs for seconds in run.seconds)
    return Finding(measure, _median(found), "s", None, at_most, found)


def _median(figures: Sequence[float]) -> float | None:
    return median(figures) if figures else None


def recovered(happened: Sequence[Mapping[str, Any]]) -> tuple[float, ...]:
    """Return the duration of each recovery in a run's events, in seconds.

    A worker's successor is the next worker that is started after its death. A successor that was not up before the end
    of the run does not count.
    """
    up = {event["worker"]: event["time"] for event in happened if event["event"] == "worker_up"}
    lost: list[float] = []  # deaths whose successors are not started yet
    seconds = []
    for event in happened:
        match event["event"]:
            case "worker_lost":
                lost.append(event["time"])
            case "worker_started" if lost:
                died = lost.pop(0)
                if event["worker"] in up:
                    seconds.append(up[event["worker"]] - died)
            case "server_restored":
                seconds.append(event["seconds"])
    return tuple(seconds)


def _measured(victim: str, turn: int, arguments: Namespace) -> Recovery:
    with TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as folder:
        with training(_job(folder, arguments.seconds), folder) as process:
            if victim in EVERY_S:
                _kill(process, victim, turn)
            found = result(process)
        check_lanes(Path(found["path"]))
        happened = events(Path(found["path"]))
    kind = "server_lost" if victim == SERVER else "worker_lost"
    kills = found["failures"].get(kind, 0)
    useful = found["ledger"]["batches"]
    again = useful / found["goodput"] - useful
    return Recovery(found["samples"] / found["duration_s"], kills, again, recovered(happened))


def _job(folder: str, seconds: float) -> dict[str, Any]:
    barrier = Path(folder, "barrier")
    barrier.mkdir()
    kwargs = {
        "inputs": SIZES[0],
        "hidden": HIDDEN,
        "sleep_s": SLEEP_S,
        "slow_s": SLEEP_S,
        "workers": WORKERS,
        "barrier": str(barrier),
    }
    return {
        "model": {"kind": "python", "path": "tests.benchmarks.sleeping_models:OneSlowWorker", "kwargs": kwargs},
        "data": {"format": "npz", "path": str(mnist_path()), "batch_size": BATCH_SIZE, "normalize": "unit"},
        "optimizer": {"lr": LEARNING_RATE},
        "scaling": {"workers": WORKERS},
        "checkpoint": {"every_s": 2.0},
        "failure": {"max_failures": -1},
        "run": {"max_time_s": seconds},
    }


def _kill(process: Popen[bytes], victim: str, seed: int) -> None:
    """Kill a process of the run at a fixed interval, from the moment when all are up to the end of the run."""
    draw = random.Random(seed)  # noqa: S311 (nothing here is a secret)
    at = None
    while process.poll() is None:
        found = [pid for pid in sorted(descendants(process.pid)) if title(pid).startswith(victim)]
        now = time.monotonic()
        if at is None and len(found) == (WORKERS if victim == WORKER else 1):
            at = now + EVERY_S[victim]
        if at is not None and now >= at and found:
            with suppress(ProcessLookupError):  # it ended by itself
                os.kill(draw.choice(found), signal.SIGKILL)
            at += EVERY_S[victim]
        time.sleep(POLL_S)


if __name__ == "__main__":
    sys.exit(main())
