"""C. Asynchronous SGD beats minibatch SGD at equal time, whatever the delays.

Konstantin Mishchenko, Francis Bach, Mathieu Even, Blake Woodworth: Asynchronous SGD Beats Minibatch SGD Under Arbitrary
Delays, NeurIPS 2022.

Setting: least squares of 2000 × 100, F(x) = |Ax - b|² / 4000, entries of A from U[0, 1] / √100, b = Ax₀ + N(0, .1) with
x₀ from U[-1, 1]; 20 workers, batches of 64 drawn with replacement, 8000 gradients. Rates, fixed beforehand: minibatch
1.5 / L, async .18 / L, and .06 / L where one worker is slow. Delays: exponential of mean 1; lognormal (0, 1); 20 for
one worker and 1 for all others. Measured is the virtual time until F - F* is at most .002. minibatch is mode bsp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

from tests.benchmarks.experiments.least_squares import LeastSquares
from tests.benchmarks.experiments.runs import Claim, TimedRun, job, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Trajectory", "claims", "figure", "run"]

WORKERS = 20
GRADIENTS = 8000
TARGET = 2e-3
SPARE = 4000  # further batches in the epoch: near its end leases shrink, which the measurement must not meet
EVERY = 80  # gradients between two points of a curve
MINIBATCH = "minibatch"
ASYNC = "async"
DELAYS = {"exponential": "exponential:1", "lognormal": "lognormal:0,1", "one slow": "slow:20"}
RATES = {"exponential": 0.18, "lognormal": 0.18, "one slow": 0.06}  # of async, multiplied by L
MINIBATCH_RATE = 1.5


@dataclass(frozen=True, slots=True)
class Trajectory:
    """The outcome of one run."""

    method: str
    delays: str
    seed: int
    seconds: float  # virtual seconds to the target; infinite if it was not reached
    points: tuple[tuple[float, float], ...]  # (virtual seconds, F - F*)


def run(seeds: Sequence[int]) -> list[Trajectory]:
    """Run both methods with each kind of delays."""
    return [_run(method, delays, seed) for delays in DELAYS for method in (MINIBATCH, ASYNC) for seed in seeds]


class _CurveRecorder:
    """Records F - F* of a run until its gradients are used up."""

    def __init__(self, squares: LeastSquares, per_step: int) -> None:
        self._squares = squares
        self._per_step = per_step
        self.seconds = inf
        self.points: list[tuple[float, float]] = []

    def done(self, run: TimedRun) -> bool:
        """Record a step. Return True if the gradients are used up."""
        excess = self._squares.excess(run.current_weights)
        gradients = self._per_step * run.updates
        if excess <= TARGET and self.seconds == inf:
            self.seconds = run.elapsed_s
        if gradients % EVERY == 0:
            self.points.append((run.elapsed_s, excess))
        return gradients >= GRADIENTS


def _run(method: str, delays: str, seed: int) -> Trajectory:
    squares = LeastSquares(seed)
    mode, rate, per_step = ("bsp", MINIBATCH_RATE, WORKERS) if method == MINIBATCH else ("async", RATES[delays], 1)
    recorder = _CurveRecorder(squares, per_step)
    spec = job(WORKERS, rate / squares.smoothness, {"mode": mode})
    TimedRun(spec, squares.problem(GRADIENTS + SPARE), DELAYS[delays], seed, recorder.done).run()
    return Trajectory(method, delays, seed, recorder.seconds, tuple(recorder.points))


def claims(results: Sequence[Trajectory]) -> list[Claim]:
    """Compare the paper's claim with the results, for each kind of delays and every seed."""
    found = []
    for delays in DELAYS:
        slow, fast = (
            [one.seconds for one in results if (one.method, one.delays) == (method, delays)]
            for method in (MINIBATCH, ASYNC)
        )
        ratios = [minibatch / asynchronous for minibatch, asynchronous in zip(slow, fast, strict=True)]
        text = f"{delays}: minibatch takes more than 5 times as long as async"
        found.append(Claim(text, f"{spread(ratios)} times", all(5 < ratio < inf for ratio in ratios)))
    return found


def figure(results: Sequence[Trajectory]) -> Figure:
    """Draw F - F* over time, for the first seed."""
    from psgd.monitoring.plots import Curve, curves

    first = min(one.seed for one in results)
    series = [
        Curve(f"{one.method}, {one.delays}", *zip(*one.points, strict=True)) for one in results if one.seed == first
    ]
    ends = [one.points[end][0] for one in results if one.seed == first for end in (0, -1)]
    target = Curve("the target", [min(ends), max(ends)], [TARGET, TARGET])
    return curves([*series, target], "virtual seconds", "F - F*", log_x=True, log_y=True)
