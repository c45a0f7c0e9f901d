"""psgd itself, run as users run it: by a job file and the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from tests.benchmarks.measurement import Measurement, seconds_parser
from tests.benchmarks.mnist import mnist_path
from tests.benchmarks.setting import BATCH_SIZE, LEARNING_RATE, NUM_WORKERS, SIZES

__all__ = ["check_lanes", "events", "job", "measure", "measurement", "result", "run_job_command_line", "training"]

LANES = {"auto": "shm"}  # lane that the workers of one machine get for `scaling.lane`, where the two differ


def job(seconds: float) -> dict[str, Any]:
    """Return the content of the job file for the measured setting."""
    return {
        "version": 1,
        "seed": 0,
        "model": {"kind": "mlp", "hidden": list(SIZES[1:-1])},
        "data": {"format": "npz", "path": str(mnist_path()), "batch_size": BATCH_SIZE, "normalize": "unit"},
        "optimizer": {"name": "sgd", "lr": LEARNING_RATE},
        "consistency": {"mode": "async"},
        "scaling": {"workers": NUM_WORKERS},
        "run": {"max_time_s": seconds},
    }


@contextmanager
def training(tree: dict[str, Any], folder: str, settings: Sequence[str] = ()) -> Iterator[subprocess.Popen[bytes]]:
    """Run `psgd train --json` on a job, and end it with the block.

    Args:
        tree: content of the job file.
        folder: folder of the job file, of the run and of Ray's files.
        settings: overrides of the form `a.b=v`.
    """
    path = Path(folder, "bench.yaml")
    path.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "psgd.cli", "train", str(path), "--json", "--name", "bench", "--storage", folder]
    for setting in settings:
        command += ["--set", setting]
    with subprocess.Popen(command, env=os.environ | {"TMPDIR": folder}, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.terminate()  # no-op if it has ended


def result(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """Wait until a run ends, and return its result.

    Raises:
        SystemExit: the run failed; its stderr says why.
    """
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(process.returncode)
    found: dict[str, Any] = json.loads(output)
    return found


def events(path: Path) -> list[dict[str, Any]]:
    """Return the events of the run in a directory."""
    return [json.loads(line) for line in (path / "events.jsonl").read_text(encoding="utf-8").splitlines()]


def check_lanes(path: Path) -> None:
    """Check that workers used the expected lane: psgd replaces a lane that does not work by a slower one.

    Args:
        path: the run's directory.

    Raises:
        SystemExit: a worker reached a server by another lane than expected.
    """
    scaling = json.loads((path / "resolved.json").read_text(encoding="utf-8"))["scaling"]
    expected = [LANES.get(scaling["lane"], scaling["lane"])] * scaling["servers"]
    for event in events(path):
        if event["event"] == "worker_up" and event["lanes"] != expected:
            raise SystemExit(f"psgd: a worker's servers are reached by {event['lanes']}, expected {expected}")


def measurement(found: dict[str, Any]) -> Measurement:
    """Return the measurement in the JSON result of a run.

    Raises:
        SystemExit: the run did not finish, or did not complete an epoch.
    """
    metrics = found["metrics"]
    updates = found["updates"]
    if found["status"] != "finished":
        raise SystemExit(f"psgd: {found['status']}: {found['error']}")
    if metrics["val/accuracy"] is None:
        raise SystemExit(f"psgd: no epoch was complete after {updates} updates: use more --seconds")
    return Measurement(
        name="psgd_job",
        updates_per_s=metrics["perf/updates_per_s"],
        updates=updates,
        seconds=(updates - 1) / metrics["perf/updates_per_s"],
        val_accuracy=metrics["val/accuracy"],
        details={"staleness_mean": metrics["async/staleness_mean"]},
    )


def measure(seconds: float, settings: Sequence[str] = ()) -> Measurement:
    """Measure the updates per second of one run, without start-up and the last checkpoint.

    Args:
        seconds: duration of the training.
        settings: overrides of the job.
    """
    with TemporaryDirectory(prefix="p", ignore_cleanup_errors=True) as folder:
        with training(job(seconds), folder, settings) as process:
            found = result(process)
        check_lanes(Path(found["path"]))
    return measurement(found)


def run_job_command_line(measure: Callable[[float, Sequence[str]], Measurement], description: str | None) -> None:
    """Run the command line of a peer that measures a job, as `run_command_line` does, with `--set` of `psgd train`."""
    parser = seconds_parser(description)
    parser.add_argument("--set", action="append", default=[], metavar="a.b=v", help="override a field of the job")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the run is ended, too
    measure(arguments.seconds, arguments.set).show()


if __name__ == "__main__":
    run_job_command_line(measure, __doc__)
