"""The cost of deaths: `python -m tests.benchmarks.recovery`.

Four workers that sleep 20 ms over each batch, on a real Ray: undisturbed; with one of them, drawn by lot, killed every
five seconds; and with the server killed every eight. A worker has recovered when its successor is up, a server when its
successor has told what it contains; both counted from when the driver sees the death. A batch is computed again if a
server had it already when it was pushed; and the one in a dead worker's hands counts as one, which is not measured.
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
BATCH_SIZE = 8  # an epoch of 38 s: no run here sees an end of one
HIDDEN = 32
WORKER = "ray::WorkerActor"
SERVER = "ray::ServerActor"
EVERY_S = {WORKER: 5.0, SERVER: 8.0}
LOOK_S = 0.05


class Recovery(NamedTuple):
    """The outcome of one run."""

    rate: float  # examples in the weights at the end per second of training
    kills: int  # that the driver saw
    again: float  # batches computed again
    seconds: tuple[float, ...]  # of each recovery


def main() -> int:
    """Measure, print the table, write the document."""
    made = parser("recovery", __doc__)
    made.add_argument("--seconds", type=float, default=27.0, help="of training in each run")
    arguments = made.parse_args()
    begin()
    turns: dict[str, list[Recovery]] = {"undisturbed": [], WORKER: [], SERVER: []}
    for turn in range(arguments.repeats):
        for victim, measured in turns.items():
            measured.append(_measured(victim, turn, arguments))
            print(f"{victim}: {measured[-1]}", flush=True)
    runs = {victim: [run._asdict() for run in of] for victim, of in turns.items()}
    return conclude("what deaths cost", findings(turns), arguments, runs)


def findings(turns: Mapping[str, Sequence[Recovery]]) -> list[Finding]:
    """Of the runs of each victim, by turn."""
    even = turns["undisturbed"]
    workers = turns[WORKER]
    servers = turns[SERVER]
    rates = [run.rate for run in even]
    again = tuple(run.again / run.kills for run in workers if run.kills)
    return [
        ratio("updates/s with one of 4 workers killed every 5 s ÷ undisturbed", _rates(workers), rates, at_least=0.8),
        Finding("batches computed again for each worker killed, 1 in its hands", _median(again), "", None, 1.0, again),
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
    """Seconds of each recovery in a run's events.

    A worker's successor is the next that is started after its death; if that did not come up before the run's end, it
    does not count.
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
    meeting = Path(folder, "meeting")
    meeting.mkdir()
    kwargs = {
        "inputs": SIZES[0],
        "hidden": HIDDEN,
        "sleep_s": SLEEP_S,
        "slow_s": SLEEP_S,
        "workers": WORKERS,
        "meeting": str(meeting),
    }
    return {
        "model": {"kind": "python", "path": "tests.benchmarks.sleeping_models:OneSlow", "kwargs": kwargs},
        "data": {"format": "npz", "path": str(mnist_path()), "batch_size": BATCH_SIZE, "normalize": "unit"},
        "optimizer": {"lr": LEARNING_RATE},
        "scaling": {"workers": WORKERS},
        "checkpoint": {"every_s": 2.0},
        "failure": {"max_failures": -1},
        "run": {"max_time_s": seconds},
    }


def _kill(process: Popen[bytes], victim: str, seed: int) -> None:
    """One every so often, from when all are there to the run's end."""
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
        time.sleep(LOOK_S)


if __name__ == "__main__":
    sys.exit(main())
