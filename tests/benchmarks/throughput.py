"""Measures psgd and its peers in one run: `python -m tests.benchmarks.throughput`, from the repository's root.

The contenders take turns, so that a machine that grows slower or faster does so for all of them. Linux only: everything
is held to as many cores as there are workers.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from tests.benchmarks.contender import CONTENDERS, Failure, run_contender
from tests.benchmarks.measurement import Measurement
from tests.benchmarks.report import document, summaries, table
from tests.benchmarks.setting import BATCH_SIZE, LEARNING_RATE, NUM_WORKERS, SIZES

__all__ = ["main"]


def main() -> int:
    """Measure, print the table, write the document; 1 if any run failed."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the contender that runs is ended too
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:NUM_WORKERS])
    console = Console()
    results = summaries(_outcomes(arguments, console))
    console.print(table(results))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document(results, _settings(arguments)), indent=2) + "\n", encoding="utf-8")
    return int(any(result.failures for result in results))


def _arguments() -> Namespace:
    parser = ArgumentParser(description="Gradients applied per second, by psgd and its peers.")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each contender")
    parser.add_argument("--seconds", type=float, default=6.0, help="measured in each run, start-up not counted")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds a run may take in all")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="these contenders")
    parser.add_argument("--out", type=Path, default=Path("bench/throughput.json"), help="where the document goes")
    return parser.parse_args()


def _outcomes(arguments: Namespace, console: Console) -> Iterator[Measurement | Failure]:
    for turn in range(1, arguments.repeats + 1):
        for name in arguments.only:
            outcome = run_contender(name, arguments.seconds, arguments.limit)
            said = f"failed: {outcome.error}" if isinstance(outcome, Failure) else f"{outcome.updates_per_s:,.0f}/s"
            console.print(f"{turn}/{arguments.repeats} {name} {said}", markup=False, highlight=False)
            yield outcome


def _settings(arguments: Namespace) -> dict[str, object]:
    return {
        "model": SIZES,
        "batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "workers": NUM_WORKERS,
        "seconds": arguments.seconds,
        "repeats": arguments.repeats,
    }


if __name__ == "__main__":
    sys.exit(main())
