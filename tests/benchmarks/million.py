"""Speed of the simulator: a million pushes of 1,000 workers, on one core: `python -m tests.benchmarks.million`."""

from __future__ import annotations

import json
import resource
import sys
from argparse import ArgumentParser
from pathlib import Path
from time import perf_counter

from psgd.simulation.delays import Lognormal
from psgd.simulation.scenario import Scenario, jobs_to_simulate
from psgd.simulation.simulate import QuadraticWorkload, simulate
from psgd.spec.reader import load_spec

__all__ = ["main"]

JOB = Path(__file__).parents[2] / "deploy" / "jobs" / "digits.yaml"  # its model and data are not used


def main() -> int:
    """Simulate, print the time and the memory, write the document."""
    parser = ArgumentParser(description="The simulator's speed: a quadratic of 100 parameters, asynchronous.")
    parser.add_argument("--pushes", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument(
        "--out", type=Path, default=Path("bench/million.json"), help="file of the results, JSON (default: %(default)s)"
    )
    arguments = parser.parse_args()
    spec = load_spec(JOB, ["run.epochs=1", "optimizer.lr=5e-4", "simulate.modes=async"])
    scenario = Scenario(arguments.workers, Lognormal(0.0, 1.0))
    ((name, job),) = jobs_to_simulate(spec, arguments.workers).items()
    began = perf_counter()
    found = simulate(name, job, QuadraticWorkload(100, arguments.pushes, seed=0), scenario, target=None)
    seconds = perf_counter() - began
    document = {
        "pushes": found.pushes["applied"],
        "workers": arguments.workers,
        "seconds": seconds,
        "pushes_per_s": found.pushes["applied"] / seconds,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "virtual_s": found.time_s,
        "staleness_mean": found.staleness["mean"],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
