"""The command `python -m tests.simulation`: runs thousands of simulated jobs with random faults.

`--seeds 0:20000` runs a range of seeds; `--seed 17` repeats one.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from time import perf_counter

from tests.simulation.fault_injection import describe_failure, draw_run, run_with_faults

__all__ = ["main"]

CHUNK = 100  # number of seeds given to a process at a time


def _failures(seeds: range) -> list[str]:
    return [failure for seed in seeds if (failure := describe_failure(seed))]


def main() -> int:
    """Run the seeds. Return 1 if a run fails, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulation",
        description="Run simulated jobs with random faults, and check the invariants of every run.",
    )
    parser.add_argument("--seeds", default="0:20000", metavar="FROM:TO", help="seeds to run (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="run one seed, and print its faults and, if it fails, the traceback")
    parser.add_argument("--processes", type=int, default=2, help="number of processes (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        print(draw_run(arguments.seed))
        cluster = run_with_faults(arguments.seed).cluster
        print(f"{cluster.finish}, after {cluster.now:.1f} virtual seconds: {cluster.status.ledger}")
        return 0
    first, last = map(int, arguments.seeds.split(":"))
    return _run_many(range(first, last), arguments.processes)


def _run_many(seeds: range, processes: int) -> int:
    chunks = [seeds[start : start + CHUNK] for start in range(0, len(seeds), CHUNK)]
    began = perf_counter()
    done = 0
    failed = 0
    with ProcessPoolExecutor(processes) as pool:
        for chunk, failures in zip(chunks, pool.map(_failures, chunks), strict=True):
            done += len(chunk)
            failed += len(failures)
            for failure in failures:
                print(failure)
            print(f"\r{done:,} of {len(seeds):,} seeds, {failed} failed", end="", file=sys.stderr, flush=True)
    seconds = perf_counter() - began
    print(f"\n{len(seeds):,} seeds in {seconds:.0f} s, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
