"""Measure psgd and its peers in one run: `python -m tests.benchmarks.throughput`, from the repository's root.

The contenders take turns, so that a machine that becomes slower or faster does so for all of them. All processes are
restricted to as many cores as there are workers, which needs Linux. Beside each run it prints the time of a message
between the cores (`cores`). The targets, ratios of psgd to each of its peers, are in `contender.CONTENDERS`.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator

from rich.console import Console

from tests.benchmarks.command import begin, parser, write
from tests.benchmarks.contender import CONTENDERS, Failure, run_turn
from tests.benchmarks.measurement import Measurement
from tests.benchmarks.report import document, summaries, table
from tests.benchmarks.setting import BATCH_SIZE, LEARNING_RATE, NUM_WORKERS, SIZES

__all__ = ["main"]


def main() -> int:
    """Measure, print the table, write the document. Return the exit code: 1 if a run failed."""
    arguments = _parser().parse_args()
    begin()
    results = summaries(_outcomes(arguments))
    Console().print(table(results))
    write(arguments.out, document(results, _settings(arguments)))
    return int(any(result.failures for result in results))


def _parser() -> ArgumentParser:
    made = parser("throughput", "Measure the gradients per second that psgd and its peers apply.")
    made.add_argument(
        "--seconds",
        type=float,
        default=6.0,
        help="seconds measured in each run, without start-up (default: %(default)s)",
    )
    made.add_argument(
        "--limit", type=float, default=120.0, help="time limit of a run, in seconds (default: %(default)s)"
    )
    made.add_argument(
        "--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="contenders to measure (default: all)"
    )
    return made


def _outcomes(arguments: Namespace) -> Iterator[Measurement | Failure]:
    for turn in range(1, arguments.repeats + 1):
        for name in arguments.only:
            yield run_turn(f"{turn}/{arguments.repeats}", name, arguments.seconds, arguments.limit)


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
