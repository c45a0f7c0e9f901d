"""psgd itself, as its users run it: a job file and the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from tests.benchmarks.measurement import Measurement, measured_for
from tests.benchmarks.mnist import mnist_path
from tests.benchmarks.setting import BATCH_SIZE, LEARNING_RATE, NUM_WORKERS, SIZES

__all__ = ["job", "measure", "measurement"]


def job(seconds: float) -> dict[str, Any]:
    """The job file of the measured setting."""
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


def measurement(result: dict[str, Any]) -> Measurement:
    """What the JSON result of a run says.

    Raises:
        SystemExit: the run did not finish.
    """
    metrics, updates = result["metrics"], result["updates"]
    if result["status"] != "finished":
        raise SystemExit(f"psgd: {result['status']}: {result['error']}")
    if metrics["val/accuracy"] is None:
        raise SystemExit(f"psgd: no epoch was complete after {updates} updates: give it more --seconds")
    return Measurement(
        name="psgd_job",
        updates_per_s=metrics["perf/updates_per_s"],
        updates=updates,
        seconds=(updates - 1) / metrics["perf/updates_per_s"],
        val_accuracy=metrics["val/accuracy"],
        details={"staleness_mean": metrics["async/staleness_mean"]},
    )


def measure(seconds: float) -> Measurement:
    """Updates of one run, start-up and the last checkpoint not counted."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "bench.yaml")
        path.write_text(yaml.safe_dump(job(seconds)))
        command = [sys.executable, "-m", "psgd.cli", "train", str(path)]
        options = ["--json", "--name", "bench", "--storage", folder]
        with subprocess.Popen(command + options, stdout=subprocess.PIPE) as process:
            try:
                output, _ = process.communicate()
            finally:
                process.terminate()  # nothing, if it has ended
    if process.returncode:
        raise SystemExit(process.returncode)
    return measurement(json.loads(output))


if __name__ == "__main__":
    measured_for(measure, __doc__)
