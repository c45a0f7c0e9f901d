"""Memory over a long run: `python -m tests.benchmarks.soak --minutes 10`.

The setting is that of `throughput`, on the shm lane. The memory of each process of the run is read from /proc every
five seconds; the first minute is start-up and does not count. RSS counts all pages. PSS divides each shared page by the
number of processes that map it, so that the weights, which server and workers map, and the data, which workers share,
count once. The target is for PSS without the pages of files: these change whenever another process of the machine
starts or stops to use the same libraries.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from subprocess import Popen
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

from tests.benchmarks.command import begin, conclude, parser
from tests.benchmarks.findings import Finding
from tests.benchmarks.peers.psgd_job import check_lanes, job, result, training
from tests.benchmarks.processes import descendants, memory, title
from tests.benchmarks.setting import NUM_WORKERS

__all__ = ["Growth", "Sample", "findings", "main"]

EVERY_S = 5.0
SETTLED_S = 60.0
TARGET_MB = 2.0
ACTORS = {"ray::ServerActor": "server", "ray::WorkerActor": "worker"}  # name by beginning of the process's title


class Sample(NamedTuple):
    """A process's memory at one moment."""

    time_s: float  # since all processes were up
    rss: float  # MB; this field and the next two as in `Memory`
    pss: float
    own: float


class Growth(NamedTuple):
    """The growth of a process's memory after its start-up."""

    more_mb: float  # median of the last samples minus median of the first samples
    mb_per_hour: float  # slope of the straight line through all samples

    @classmethod
    def of(cls, times: Sequence[float], megabytes: Sequence[float]) -> Growth:
        """Compare the first and the last twelfth of the samples: a single sample may meet the write of a checkpoint."""
        compared = max(1, len(times) // 12)
        slope = float(np.polyfit(times, megabytes, 1)[0]) if len(times) > 1 else 0.0
        return cls(median(megabytes[-compared:]) - median(megabytes[:compared]), 3600 * slope)


def main() -> int:
    """Measure, print the table, write the document."""
    made = parser("soak", __doc__, repeats=1)
    made.add_argument("--minutes", type=float, default=10.0, help="minutes of training (default: %(default)s)")
    made.add_argument(
        "--settled",
        type=float,
        default=SETTLED_S,
        help="seconds of start-up, in which growth does not count (default: %(default)s)",
    )
    arguments = made.parse_args()
    begin()
    turns = [_samples(60 * arguments.minutes) for _ in range(arguments.repeats)]
    runs = {"samples": turns, "columns": Sample._fields}
    return conclude("memory of a run", findings(turns, arguments.settled), arguments, runs)


def findings(turns: Sequence[Mapping[str, Sequence[Sample]]], settled_s: float) -> list[Finding]:
    """Return the growth of the server, the driver and the worker that grew most.

    Args:
        turns: samples by process, for each turn.
        settled_s: seconds of start-up, in which growth does not count.
    """
    found = []
    for name, at_most in (("server", TARGET_MB), ("worker", None), ("driver", None)):
        own, pss, rss = ([_most_grown(turn, name, settled_s, of) for turn in turns] for of in ("own", "pss", "rss"))
        by_turn = tuple(growth.more_mb for growth in own)
        last = median(max(samples[-1].own for samples in _of(turn, name)) for turn in turns)
        found += [
            Finding(f"{name}'s own memory, growth after start-up", median(by_turn), "MB", None, at_most, by_turn),
            Finding(f"{name}'s own memory, slope", median(growth.mb_per_hour for growth in own), "MB/h"),
            Finding(f"{name}'s PSS, growth after start-up", median(growth.more_mb for growth in pss), "MB"),
            Finding(f"{name}'s RSS, growth after start-up", median(growth.more_mb for growth in rss), "MB"),
            Finding(f"{name}'s own memory at the end", last, "MB"),
        ]
    return found


def _most_grown(turn: Mapping[str, Sequence[Sample]], name: str, settled_s: float, column: str) -> Growth:
    growths = []
    for samples in _of(turn, name):
        settled = [sample for sample in samples if sample.time_s >= settled_s]
        growths.append(Growth.of([one.time_s for one in settled], [getattr(one, column) for one in settled]))
    return max(growths)


def _of(turn: Mapping[str, Sequence[Sample]], name: str) -> list[Sequence[Sample]]:
    return [samples for process, samples in turn.items() if process.startswith(name)]


def _samples(seconds: float) -> dict[str, list[Sample]]:
    """Return the samples of each process of one run, from the moment when all were up."""
    tree = job(seconds)
    tree["scaling"]["lane"] = "shm"
    with TemporaryDirectory(prefix="k", ignore_cleanup_errors=True) as folder, training(tree, folder) as process:
        found = _watched(process)
        check_lanes(Path(result(process)["path"]))
    return found


def _watched(process: Popen[bytes]) -> dict[str, list[Sample]]:
    found = defaultdict[str, list[Sample]](list)
    began = None
    while process.poll() is None:
        pids = _pids(process.pid)
        if len(pids) == 2 + NUM_WORKERS:
            now = time.monotonic()
            began = began or now
            for name, pid in pids.items():
                with suppress(OSError):  # the process has just ended
                    found[name].append(Sample(now - began, *memory(pid)))
        time.sleep(EVERY_S)
    return dict(found)


def _pids(driver: int) -> dict[str, int]:
    """Return the process ids of the driver and of its server and workers that exist, by name."""
    found = {"driver": driver}
    for pid in sorted(descendants(driver)):
        for beginning, name in ACTORS.items():
            if title(pid).startswith(beginning):
                found[f"{name} {sum(one.startswith(name) for one in found) + 1}"] = pid
    return found


if __name__ == "__main__":
    sys.exit(main())
