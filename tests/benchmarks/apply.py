"""Speed of a server's step, in bytes per second beside a copy of the weights: `python -m tests.benchmarks.apply`.

A step that reads and writes each of its arrays once, and that only memory limits, is as fast as a copy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter
from typing import NamedTuple

import numpy as np

from psgd.core.server.optimizers import build_optimizer
from psgd.spec import AdagradOptimizer, AdamOptimizer, OptimizerSpec, SgdOptimizer
from tests.benchmarks.command import begin, conclude, parser
from tests.benchmarks.findings import Finding, ratio

__all__ = ["main"]

COPIED = 8  # bytes for each value: four read and four written


class Contender(NamedTuple):
    """An optimizer, and the memory that its step touches."""

    spec: OptimizerSpec
    touched: int  # bytes for each value: read the gradient; read and write the weights and each vector of state
    target: dict[str, float]  # arguments of `ratio`


CONTENDERS = {
    "momentum": Contender(SgdOptimizer(lr=1e-3, momentum=0.9), 20, {"at_least": 0.5}),
    "sgd": Contender(SgdOptimizer(lr=1e-3), 12, {}),
    "adagrad": Contender(AdagradOptimizer(name="adagrad", lr=1e-3), 20, {}),
    "adam": Contender(AdamOptimizer(name="adam", lr=1e-3), 28, {}),
}


def main() -> int:
    """Measure in turns, print the table, write the document."""
    command = parser("apply", __doc__, repeats=9)
    command.add_argument("--values", type=int, default=25_000_000, help="float32 values of the weights")
    arguments = command.parse_args()
    begin()
    turns = _seconds(arguments.values, arguments.repeats)
    times = [
        Finding(name, median(taken) * 1e3, "ms", turns=tuple(one * 1e3 for one in taken))
        for name, taken in turns.items()
    ]
    copied = [COPIED / one for one in turns["copy"]]
    speeds = [
        ratio(f"{name}'s bytes/s ÷ copy's", [touched / one for one in turns[name]], copied, **target)
        for name, (_, touched, target) in CONTENDERS.items()
    ]
    return conclude(f"a step on {arguments.values:,} values", times + speeds, arguments, {"seconds": turns})


def _seconds(values: int, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of a copy and of each contender's step, by turn."""
    weights = np.ones(values, np.float32)
    copy = np.empty(values, np.float32)
    gradient = np.random.default_rng(0).standard_normal(values, dtype=np.float32)
    tasks: dict[str, Callable[[], None]] = {"copy": partial(np.copyto, copy, weights)}
    for name, (spec, _, _) in CONTENDERS.items():
        tasks[name] = partial(build_optimizer(spec, values).step, weights, gradient, spec.lr)
    for task in tasks.values():  # the first step maps memory and starts the momentum
        task()
    turns: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(repeats):
        for name, task in tasks.items():
            began = perf_counter()
            task()
            turns[name].append(perf_counter() - began)
    return turns


if __name__ == "__main__":
    sys.exit(main())
