"""Many runs in which everything fails: `python -m tests.chaos --seeds 0:20000`; or one again: `--seed 17`."""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from time import perf_counter

from psgd.errors import RunError
from tests.simulation.fault_injection import draw_run, run_with_faults

__all__ = ["fault", "main"]

CHUNK = 100  # seeds given to a process at a time


def fault(seed: int) -> str | None:
    """What is wrong with the run of a seed, and how to see it again; None: nothing."""
    try:
        run_with_faults(seed)
    except (AssertionError, LookupError, RunError, TypeError, ValueError) as error:  # whatever a bug raises
        return f"seed {seed}: {type(error).__name__}: {error}\n  again: python -m tests.chaos --seed {seed}"
    return None


def _faults(seeds: range) -> list[str]:
    return [found for seed in seeds if (found := fault(seed))]


def main() -> int:
    """Run the seeds; 1 if one of them fails."""
    parser = argparse.ArgumentParser(
        description="Random failures on the virtual cluster, checked against the invariants."
    )
    parser.add_argument("--seeds", default="0:20000", metavar="FROM:TO", help="which (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="one seed alone, with its plan and, if it fails, the traceback")
    parser.add_argument("--processes", type=int, default=2)
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
        for chunk, faults in zip(chunks, pool.map(_faults, chunks), strict=True):
            done += len(chunk)
            failed += len(faults)
            for found in faults:
                print(found)
            print(f"\r{done:,} of {len(seeds):,} seeds, {failed} failed", end="", file=sys.stderr, flush=True)
    seconds = perf_counter() - began
    print(f"\n{len(seeds):,} seeds in {seconds:.0f} s, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
