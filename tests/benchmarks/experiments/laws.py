"""Runtime laws: the time of a step when compute times are exponential.

Sanghamitra Dutta, Gauri Joshi, Soumyadip Ghosh, Parijat Dube, Priya Nagpurkar: Slow and Stale Gradients Can Win the
Race, AISTATS 2018.

Setting: P workers; each gradient takes an exponential time of mean 1 / λ = 1, and nothing else takes time. K-sync steps
on the first K gradients and calls the other P - K computations off: (H_P - H_{P-K}) / λ a step, H the harmonic numbers.
async: 1 / (Pλ) a step. The simulator does the former in mode k_sync with `stop: true` and `Timing.interrupts`. A real
worker cannot be interrupted: with `stop` or without, late workers finish first, and only then start from the new
weights; such steps take T(0, P - K), where T(w, l) is the time left when w gradients are in and l workers are late:

    T(w, l) = (1 / λ + (P - w - l)·T(w + 1, l) + l·T(w, l - 1)) / (P - w),   T(K, l) = 0.

For K = P both are H_P / λ, the time of bsp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np

from psgd.simulation.problem import Problem
from psgd_workers.messages import BatchId, EpochGrid, FloatArray
from tests.benchmarks.experiments.runs import Claim, TimedRun, job

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["StepTime", "claims", "figure", "run"]

WORKERS = 16
GRADIENTS_IN_STEP = (1, 4, 8, 12, 15, 16)
STEPS = 6000  # of all seeds together; more steps → nearer to the law
TOLERANCE = 0.03
CALLED_OFF = "K-sync, late workers called off"
FINISHED = "k_sync, late gradients refused"
ASYNC = "async"


@dataclass(frozen=True, slots=True)
class StepTime:
    """The mean time of a step over all seeds."""

    method: str
    k: int  # gradients in a step; 1 for async
    seconds: float  # virtual seconds per step
    law: float  # the same by the law

    @property
    def deviation(self) -> float:
        """Relative deviation from the law."""
        return self.seconds / self.law - 1


def run(
    seeds: Sequence[int], ks: Sequence[int] = GRADIENTS_IN_STEP, workers: int = WORKERS, steps: int = STEPS
) -> list[StepTime]:
    """Run each K with and without calling computations off, and async."""
    each = steps // len(seeds)
    results: list[StepTime] = []
    for k in ks:
        mode = {"mode": "k_sync", "k": k}
        results += [
            StepTime(CALLED_OFF, k, _mean(mode | {"stop": True}, workers, seeds, each), _harmonic(workers, k)),
            StepTime(FINISHED, k, _mean(mode, workers, seeds, each), _without_calling_off(workers, k)),
        ]
    return [*results, StepTime(ASYNC, 1, _mean({"mode": "async"}, workers, seeds, each), 1 / workers)]


def _mean(mode: dict[str, Any], workers: int, seeds: Sequence[int], steps: int) -> float:
    spec = job(workers, 1.0, mode)
    batches = 2 * steps * workers
    problem = Problem(EpochGrid((batches,), batches), np.zeros(1, np.float32), _nothing)
    runs = [TimedRun(spec, problem, "exponential:1", seed, lambda run: run.updates >= steps).run() for seed in seeds]
    return mean(run.end.elapsed_s / steps for run in runs)


def _nothing(batch: BatchId, weights: FloatArray, out: FloatArray) -> float:
    out[:] = 0
    return 0.0


def _harmonic(workers: int, k: int) -> float:
    """Return H_P - H_{P-K}."""
    return sum(1 / i for i in range(workers - k + 1, workers + 1))


def _without_calling_off(workers: int, k: int) -> float:
    """Return T(0, P - K) of the module's docstring."""

    @cache
    def left(waiting: int, late: int) -> float:
        if waiting == k:
            return 0.0
        fresh = workers - waiting - late
        after = (fresh * left(waiting + 1, late) if fresh else 0.0) + (late * left(waiting, late - 1) if late else 0.0)
        return (1 + after) / (workers - waiting)

    return left(0, workers - k)


def claims(results: Sequence[StepTime]) -> list[Claim]:
    """Compare each law with the results, within 3 %."""
    laws = {
        CALLED_OFF: "a step of k_sync whose late workers are called off takes (H_P - H_{P-K}) / λ",
        FINISHED: "a step of mode k_sync without stop takes T(0, P - K)",
        ASYNC: "a step of async takes 1 / (Pλ)",
    }
    found = []
    for method, text in laws.items():
        worst = max((one.deviation for one in results if one.method == method), key=abs)
        found.append(Claim(f"{text}, within 3 %", f"at most {100 * worst:+.1f} % off", abs(worst) <= TOLERANCE))
    return found


def figure(results: Sequence[StepTime]) -> Figure:
    """Time of a step against K; the bands are the laws, 3 % to both sides."""
    from psgd.monitoring.plots import Curve, curves

    series = []
    for method in (CALLED_OFF, FINISHED):
        found = sorted((one for one in results if one.method == method), key=lambda one: one.k)
        low, high = ([(1 + side * TOLERANCE) * one.law for one in found] for side in (-1, 1))
        series.append(Curve(method, [one.k for one in found], [one.seconds for one in found], low, high))
    return curves(series, "K, gradients in a step", "virtual seconds per step")
