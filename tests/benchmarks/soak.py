"""Memory over a long run: `python -m tests.benchmarks.soak --minutes 10`.

The setting of `throughput`, on the shm lane. Every five seconds the memory of each process of the run is read from
/proc; what the first minute brings is start-up. RSS is all of it. PSS counts each shared page by shares, so that the
weights that server and workers map, and the data that workers share, count once. Judged is PSS without pages of files,
which changes whenever another process of the machine begins or ends to use the same libraries.
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
TARGET_MB = 5.0
ACTORS = {"ray::ServerActor": "server", "ray::WorkerActor": "worker"}  # by the beginning of a process's title


class Sample(NamedTuple):
    """A process's memory at one moment."""

    time_s: float  # since all processes were there
    rss: float  # MB; these three as in `Memory`
    pss: float
    own: float


class Growth(NamedTuple):
    """How much more memory a process holds at the end than once it had settled."""

    more_mb: float  # the last samples' median less the first ones'
    mb_per_hour: float  # slope of the straight line through all of them

    @classmethod
    def of(cls, times: Sequence[float], megabytes: Sequence[float]) -> Growth:
        """Of samples, which are compared by a twelfth at each end: one alone may meet a checkpoint being written."""
        few = max(1, len(times) // 12)
        slope = float(np.polyfit(times, megabytes, 1)[0]) if len(times) > 1 else 0.0
        return cls(median(megabytes[-few:]) - median(megabytes[:few]), 3600 * slope)


def main() -> int:
    """Measure, print the table, write the document."""
    made = parser("soak", __doc__, repeats=1)
    made.add_argument("--minutes", type=float, default=10.0, help="of training")
    made.add_argument("--settled", type=float, default=SETTLED_S, help="seconds until growth counts")
    arguments = made.parse_args()
    begin()
    turns = [_samples(60 * arguments.minutes) for _ in range(arguments.repeats)]
    runs = {"samples": turns, "columns": Sample._fields}
    return conclude("memory of a run", findings(turns, arguments.settled), arguments, runs)


def findings(turns: Sequence[Mapping[str, Sequence[Sample]]], settled_s: float) -> list[Finding]:
    """Of the samples of each process, by turn: what the server grew by, and of the workers the one that grew most."""
    found = []
    for name, at_most in (("server", TARGET_MB), ("worker", None), ("driver", None)):
        own, pss, rss = ([_most_grown(turn, name, settled_s, of) for turn in turns] for of in ("own", "pss", "rss"))
        by_turn = tuple(growth.more_mb for growth in own)
        last = median(max(samples[-1].own for samples in _of(turn, name)) for turn in turns)
        found += [
            Finding(f"{name}'s own memory, last less settled", median(by_turn), "MB", None, at_most, by_turn),
            Finding(f"{name}'s own memory, straight line", median(growth.mb_per_hour for growth in own), "MB/h"),
            Finding(f"{name}'s PSS, last less settled", median(growth.more_mb for growth in pss), "MB"),
            Finding(f"{name}'s RSS, last less settled", median(growth.more_mb for growth in rss), "MB"),
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
    """Of each process of one run, from when all were there."""
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
                with suppress(OSError):  # it ended meanwhile
                    found[name].append(Sample(now - began, *memory(pid)))
        time.sleep(EVERY_S)
    return dict(found)


def _pids(driver: int) -> dict[str, int]:
    """Of the driver, and of its server and its workers as far as they are there."""
    found = {"driver": driver}
    for pid in sorted(descendants(driver)):
        for beginning, name in ACTORS.items():
            if title(pid).startswith(beginning):
                found[f"{name} {sum(one.startswith(name) for one in found) + 1}"] = pid
    return found


if __name__ == "__main__":
    sys.exit(main())
