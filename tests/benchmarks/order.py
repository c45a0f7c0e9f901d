"""Compare the order of modes, by time to a target, in the simulator and on Ray: `python -m tests.benchmarks.order`.

16 workers train digits to a validation accuracy in each of several modes. Their gradients take seeded log-normal times,
most of which are sleep. The simulator uses the same times, batch by batch. Absolute times differ, because the simulator
does not know that 16 processes share two cores; the order must be the same.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import ray
from rich.console import Console
from rich.table import Table

import psgd
from psgd.job import OpenJob
from psgd.simulation.cluster import VirtualCluster
from psgd.simulation.problem import Problem, Timing
from psgd_workers.messages import BatchId
from psgd_workers.worker import batch_seed
from tests.benchmarks.process_group import ONE_THREAD
from tests.benchmarks.sleeping_models import delay_s

__all__ = ["main", "real_s", "simulated_s"]

WORKERS = 16
HIDDEN = 32
SCALE_S = 0.15
TARGET = 0.7
MODES: dict[str, dict[str, Any]] = {
    "async": {"mode": "async"},
    "k_sync, k=12": {"mode": "k_sync", "k": 12},
    "bsp": {"mode": "bsp"},
}
LIMIT_S = 400.0
TIMING = Timing(call_s=0.001, link_s=0.005, start_s=1.0, poll_s=0.2, evaluate_s=0.02)


def job(mode: dict[str, Any], model: dict[str, Any], storage: str) -> psgd.JobSpec:
    """Return the job: digits, until the target accuracy."""
    return psgd.JobSpec.model_validate(
        {
            "name": "order",
            "model": model,
            "data": {
                "format": "sklearn",
                "dataset": "digits",
                "batch_size": 8,
                "normalize": "unit",
                "validation_fraction": 0.2,
            },
            "optimizer": {"lr": 0.05},
            "consistency": mode,
            "scaling": {"workers": WORKERS},
            "checkpoint": {"every_s": None},
            "failure": {"timeout_s": 300.0},  # the first worker waits for the last, and 16 start slowly
            "run": {
                "max_time_s": LIMIT_S,
                "target": {"metric": "val/accuracy", "value": TARGET},
                "storage": storage,
            },
        }
    )


def simulated_s(mode: dict[str, Any]) -> float:
    """Return the virtual seconds to the target."""
    spec = job(mode, {"kind": "mlp", "hidden": [HIDDEN]}, "unused")
    open_job = OpenJob.open(spec)
    worker = open_job.worker("simulated")
    shards = open_job.shards
    validation = open_job.dataset.validation
    assert validation is not None
    problem = Problem(
        shards.grid,
        open_job.weights,
        worker.gradient,
        evaluate=lambda weights: worker.evaluate(weights, validation),
    )

    def compute_s(name: str, batch: BatchId) -> float:
        del name
        return delay_s(batch_seed(spec.seed, batch), SCALE_S)

    run = VirtualCluster(spec, problem, compute_s, timing=TIMING).run()
    assert run.status.began is not None
    return run.now - run.status.began


def real_s(mode: dict[str, Any]) -> float:
    """Return the seconds to the target on Ray, from the moment when all workers were up."""
    with TemporaryDirectory() as folder:
        barrier = Path(folder, "barrier")
        barrier.mkdir()
        kwargs = {"hidden": HIDDEN, "scale_s": SCALE_S, "workers": WORKERS, "barrier": str(barrier)}
        model = {"kind": "python", "path": "tests.benchmarks.sleeping_models:LognormalSleep", "kwargs": kwargs}
        result = psgd.train(job(mode, model, folder), progress=False)
        started = max(file.stat().st_mtime for file in barrier.iterdir())
        lines = (Path(result.path) / "events.jsonl").read_text().splitlines()
        finished = next(line["time"] for line in map(json.loads, lines) if line["event"] == "finished")
        if (result.metrics["val/accuracy"] or 0) < TARGET:
            raise SystemExit(f"{mode} did not reach {TARGET} in {LIMIT_S} s: {result.metrics}")
        return float(finished - started)


def main() -> int:
    """Measure and simulate, print the table, write the document. Return the exit code: 1 if the orders differ."""
    parser = ArgumentParser(description="Compare the order of modes, by time to a target, in the simulator and on Ray.")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each mode on Ray (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("bench/order.json"), help="file of the results, JSON (default: %(default)s)"
    )
    arguments = parser.parse_args()
    os.environ.update(ONE_THREAD, RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled")
    simulated = {name: simulated_s(mode) for name, mode in MODES.items()}
    real: dict[str, list[float]] = {name: [] for name in MODES}
    with TemporaryDirectory(prefix="o") as folder:
        ray.init(address="local", num_cpus=WORKERS, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        try:
            for _ in range(arguments.repeats):
                for name, mode in MODES.items():
                    real[name].append(real_s(mode))
        finally:
            ray.shutdown()
    medians = {name: median(seconds) for name, seconds in real.items()}
    table = Table("mode", "simulated, s", "real, s (median)", "real, s (min-max)", title=f"to accuracy {TARGET}")
    for name, seconds in real.items():
        spread = f"{min(seconds):.1f}-{max(seconds):.1f}"
        table.add_row(name, f"{simulated[name]:.1f}", f"{medians[name]:.1f}", spread)
    agrees = sorted(medians, key=lambda name: medians[name]) == sorted(simulated, key=lambda name: simulated[name])
    console = Console()
    console.print(table)
    console.print("the orders agree" if agrees else "the orders differ")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    document = {"simulated_s": simulated, "real_s": real, "orders_agree": agrees}
    arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
