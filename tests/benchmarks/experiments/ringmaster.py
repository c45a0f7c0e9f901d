"""B. Ringmaster's time does not grow with the number of slower and slower workers; that of async does.

Artavazd Maranjyan, Alexander Tyurin, Peter Richtárik: Ringmaster ASGD: The First Asynchronous SGD with Optimal Time
Complexity, ICML 2025; against delay-adaptive rates (Mishchenko et al., NeurIPS 2022) and Rennala (Tyurin and Richtárik,
NeurIPS 2023).

Setting: the tridiagonal quadratic of 64 values, noise .1 in each coordinate of a gradient; worker i takes i + |N(0,
√i)| for a gradient. The rates are fixed beforehand: ringmaster R = 32 at .0938, async and delay_adaptive at .0469,
rennala S = 8 at .75. Measured is the virtual time until the running mean of f - f* after each step is at most .05; it
keeps .9 of itself with each gradient, that is .9⁸ with each step of rennala.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from statistics import mean
from typing import TYPE_CHECKING, Any, NamedTuple

from psgd.simulation.quadratic import Quadratic
from tests.benchmarks.experiments.runs import Claim, TimedRun, job, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Reached", "claims", "figure", "run"]

WORKERS = (8, 32, 128, 512)
TARGET = 0.05
KEPT = 0.9  # weight of the past in the running mean; higher → smoother, and delayed by 1 / (1 - KEPT) gradients
PUSHES = 20_000  # more than any run needs


class Method(NamedTuple):
    """The settings of one method."""

    lr: float
    consistency: dict[str, Any]
    correction: str = "none"
    per_step: int = 1  # gradients in a step


METHODS = {
    "ringmaster": Method(0.0938, {"mode": "ringmaster", "r": 32}),
    "async": Method(0.0469, {"mode": "async"}),
    "delay_adaptive": Method(0.0469, {"mode": "async"}, "delay_adaptive"),
    "rennala": Method(0.75, {"mode": "rennala", "s": 8}, per_step=8),
}


@dataclass(frozen=True, slots=True)
class Reached:
    """The outcome of one run."""

    method: str
    workers: int
    seed: int
    seconds: float  # virtual seconds to the target; infinite if it was not reached
    updates: int


def run(seeds: Sequence[int], workers: Sequence[int] = WORKERS) -> list[Reached]:
    """Run each method with each number of workers."""
    return [_time(name, number, seed) for number in workers for name in METHODS for seed in seeds]


class _RunningMean:
    """The running mean of f - f* over a run."""

    def __init__(self, quadratic: Quadratic, kept: float) -> None:
        self._quadratic = quadratic
        self._kept = kept
        self._mean = quadratic.excess(quadratic.start)

    def reached(self, run: TimedRun) -> bool:
        """Take a step into account. Return True if the mean has reached the target."""
        self._mean = self._kept * self._mean + (1 - self._kept) * self._quadratic.excess(run.current_weights)
        return self._mean <= TARGET


def _time(name: str, workers: int, seed: int) -> Reached:
    method = METHODS[name]
    quadratic = Quadratic(64, seed=seed)
    running_mean = _RunningMean(quadratic, KEPT**method.per_step)
    spec = job(workers, method.lr, method.consistency, method.correction)
    done = TimedRun(spec, quadratic.problem(PUSHES), "linear:1,1", seed, running_mean.reached).run()
    seconds = done.end.elapsed_s if done.reached else inf
    return Reached(name, workers, seed, seconds, done.end.report.version.updates)


def claims(results: Sequence[Reached]) -> list[Claim]:
    """Compare the paper's claims with the results, at the paper's scale; it claims nothing for few workers."""
    fewest, *others = _workers(results)
    most = others[-1]
    level = [_mean(results, "ringmaster", number) / _mean(results, "ringmaster", fewest) for number in others]
    found = [
        Claim(
            f"ringmaster does not depend on the number of workers: its time is .7 to 1.3 of that with {fewest} workers",
            spread(level, ".2f"),
            min(level) >= 0.7 and max(level) <= 1.3,
        )
    ]
    for name, least in (("async", 3.0), ("delay_adaptive", 1.7), ("rennala", 1.3)):
        ratio = _mean(results, name, most) / _mean(results, "ringmaster", most)
        text = f"with {most} workers {name} takes more than {least:g} times as long as ringmaster"
        found.append(Claim(text, f"{ratio:.2f} times", ratio > least))
    return found


def figure(results: Sequence[Reached]) -> Figure:
    """Draw the mean time against the number of workers; the bands reach from the fastest seed to the slowest."""
    from psgd.monitoring.plots import Curve, curves

    numbers = _workers(results)
    series = []
    for name in METHODS:
        times = [_seconds(results, name, number) for number in numbers]
        low, middle, high = ([one(values) for values in times] for one in (min, mean, max))
        series.append(Curve(name, numbers, middle, low, high))
    drawn = curves(series, "workers", "virtual seconds to the target", log_x=True, log_y=True)
    (axes,) = drawn.axes
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.set_xticks([], minor=True)
    return drawn


def _workers(results: Sequence[Reached]) -> list[int]:
    return sorted({one.workers for one in results})


def _seconds(results: Sequence[Reached], method: str, workers: int) -> list[float]:
    return [one.seconds for one in results if one.method == method and one.workers == workers]


def _mean(results: Sequence[Reached], method: str, workers: int) -> float:
    return mean(_seconds(results, method, workers))
