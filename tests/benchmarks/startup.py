"""Time from `psgd train` to the first applied gradient: `python -m tests.benchmarks.startup`.

The setting is that of `throughput`. The server's journal has the time of the first push, on the machine's monotonic
clock, which also gives the time of the command's start. The time of Ray itself is subtracted: that of a Python that
imports Ray and starts it with the same options, measured in the same turns.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np

from psgd.core.server.journal import RECORD, RecordKind
from psgd_workers.messages import Outcome
from tests.benchmarks.command import begin, conclude, parser
from tests.benchmarks.findings import Finding
from tests.benchmarks.peers.psgd_job import check_lanes, events, job, result, training
from tests.benchmarks.setting import NUM_WORKERS

__all__ = ["OPTIONS", "findings", "first_applied", "main"]

TARGET_S = 2.0
UPDATES = 20  # of each run
BARE = "import json, sys, time, ray; ray.init(**json.loads(sys.argv[1])); print(time.monotonic()); ray.shutdown()"
# Options with which `psgd train` starts a local Ray in this setting.
OPTIONS = {"address": "local", "num_cpus": NUM_WORKERS + 1, "include_dashboard": False, "logging_level": logging.ERROR}
STAGES = ("started", "worker_started", "worker_up")  # events of the run


def main() -> int:
    """Measure, print the table, write the document."""
    arguments = parser("startup", __doc__, repeats=5).parse_args()
    begin()
    turns: dict[str, list[float]] = {name: [] for name in ("ray", "psgd", *STAGES)}
    for _ in range(arguments.repeats):
        turns["ray"].append(_ray_s())
        for name, seconds in _psgd_s().items():
            turns[name].append(seconds)
    return conclude("seconds to the first gradient applied", findings(turns), arguments, turns)


def findings(turns: Mapping[str, Sequence[float]]) -> list[Finding]:
    """Return the figures.

    Args:
        turns: seconds since the start of the command, by event, for each turn.
    """
    beyond = tuple(psgd - ray for psgd, ray in zip(turns["psgd"], turns["ray"], strict=True))
    stages = {
        "`psgd train` until its first gradient is applied": "psgd",
        "a bare Python that imports and starts Ray": "ray",
        "`psgd train` until Ray runs": "started",
        "`psgd train` until its last worker is started": "worker_started",
        "`psgd train` until its last worker is up": "worker_up",
    }
    return [
        Finding(
            "`psgd train` until its first gradient is applied, minus Ray's start",
            median(beyond),
            "s",
            at_most=TARGET_S,
            turns=beyond,
        ),
        *(Finding(text, median(turns[name]), "s", turns=tuple(turns[name])) for text, name in stages.items()),
    ]


def first_applied(path: Path) -> float:
    """Return the time of the first push that a run's server applied, in seconds of the machine's monotonic clock.

    Args:
        path: the run's directory.
    """
    records = np.concatenate([np.load(file) for file in sorted((path / "journal").glob("*.npy"))])
    assert records.dtype == RECORD
    applied = records["outcome"] == list(Outcome).index(Outcome.APPLIED)
    return float(records["now"][(records["kind"] == RecordKind.PUSH) & applied].min())


def _ray_s() -> float:
    """Return the seconds until a bare Python has started Ray."""
    with TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-c", BARE, json.dumps(OPTIONS)]
        env = os.environ | {"TMPDIR": folder}
        began = time.monotonic()
        output = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True).stdout
    return float(output.split()[-1]) - began


def _psgd_s() -> dict[str, float]:
    """Return the seconds until the first gradient is applied, and until each stage before it."""
    with TemporaryDirectory(prefix="p", ignore_cleanup_errors=True) as folder:
        tree = job(1.0) | {"run": {"max_updates": UPDATES}}
        began = time.monotonic()
        began_at = time.time()
        with training(tree, folder) as process:
            path = Path(result(process)["path"])
        check_lanes(path)
        happened = {event["event"]: event["time"] - began_at for event in events(path)}  # the last of each kind
        return {"psgd": first_applied(path) - began} | {stage: happened[stage] for stage in STAGES}


if __name__ == "__main__":
    sys.exit(main())
