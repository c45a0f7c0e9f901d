"""A. A rate divided by staleness stays level with hard sync, where a fixed one fails.

Wei Zhang, Suyog Gupta, Xiangru Lian, Ji Liu: Staleness-aware Async-SGD for Distributed Deep Learning, IJCAI 2016.

Setting: scikit-learn's digits, features scaled to [0, 1], 1437 examples to train on and 360 to test on, split by the
seed; a perceptron 64-32-10; 30 workers, batches of 16, 30 epochs' worth of gradients, rate .2, no momentum; a gradient
takes Gamma(100, 0.01). s-softsync steps on the mean of 30 / s gradients, so that staleness is about s; hard sync is
bsp. The paper's servers know no epochs; therefore the epochs are joined to one, and no worker waits for the last
batches of an epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np

from psgd.job import OpenJob
from psgd.simulation.problem import Problem
from psgd_workers.messages import BatchId, EpochGrid, FloatArray
from tests.benchmarks.experiments.runs import Claim, TimedRun, job, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Trained", "claims", "figure", "run"]

WORKERS = 30
EPOCHS = 30
LR = 0.2
STALENESS = (1, 6, 15, 30)
FIXED = "fixed rate"
AWARE = "rate / staleness"
HARD = "hard sync"
CORRECTIONS = {FIXED: "none", AWARE: "staleness_lr"}
DIGITS: dict[str, Any] = {
    "model": {"kind": "mlp", "hidden": [32]},
    "data": {
        "format": "sklearn",
        "dataset": "digits",
        "batch_size": 16,
        "drop_last": True,  # so that all batches of the joined epochs are equally large
        "normalize": "unit",
        "validation_fraction": 360 / 1797,
    },
}


@dataclass(frozen=True, slots=True)
class Trained:
    """The outcome of one run."""

    method: str
    s: int  # of softsync; 0 for hard sync
    seed: int
    test_error: float
    staleness: float  # mean


def run(seeds: Sequence[int], staleness: Sequence[int] = STALENESS) -> list[Trained]:
    """Run hard sync once for each seed, and softsync with both rates at each staleness."""
    results: list[Trained] = []
    for seed in seeds:
        results.append(_train(HARD, 0, seed))
        results += [_train(method, s, seed) for s in staleness for method in CORRECTIONS]
    return results


def _train(method: str, s: int, seed: int) -> Trained:
    mode = {"mode": "softsync", "s": s} if s else {"mode": "bsp"}
    opened = OpenJob.open(job(WORKERS, LR, mode, CORRECTIONS.get(method, "none"), seed=seed, **DIGITS))
    in_epoch = opened.shards.grid.num_batches
    steps = EPOCHS * in_epoch // (WORKERS // max(1, s))
    done = TimedRun(opened.spec, _problem(opened), "gamma:100,0.01", seed, lambda run: run.updates >= steps).run()
    validation = opened.dataset.validation
    counts = done.end.report.staleness
    assert validation
    with np.errstate(over="ignore", invalid="ignore"):  # in runs that diverged
        accuracy = opened.worker("test").evaluate(done.end.weights, validation).accuracy
    assert accuracy is not None
    staleness = sum(value * times for value, times in counts.items()) / sum(counts.values())
    return Trained(method, s, seed, 1 - accuracy, staleness)


def _problem(opened: OpenJob) -> Problem:
    """Return twice the needed epochs, joined to one, so that leases do not shrink before the measurement ends."""
    worker = opened.worker("simulated")
    shards = opened.shards
    in_epoch = shards.grid.num_batches
    batches = 2 * EPOCHS * in_epoch

    def original(batch: BatchId) -> BatchId:
        epoch, index = divmod(batch.index, in_epoch)
        return BatchId(epoch, 0, index)

    def gradient(batch: BatchId, weights: FloatArray, out: FloatArray) -> float:
        return worker.gradient(original(batch), weights, out)

    grid = EpochGrid((batches,), 2 * EPOCHS * shards.grid.num_examples)
    return Problem(grid, opened.weights, gradient)


def claims(results: Sequence[Trained]) -> list[Claim]:
    """Compare the paper's claims with the results."""
    fixed = [one.test_error for one in results if one.method == FIXED and one.s >= 15]
    level = mean(_errors(results, HARD, 0))
    aware = [mean(_errors(results, AWARE, s)) - level for s in _staleness(results)]
    taus = [one.staleness / one.s for one in results if one.method == AWARE]
    return [
        Claim("a fixed rate fails at staleness 15 and above: test error > .8", spread(fixed, ".2f"), min(fixed) > 0.8),
        Claim(
            "a rate divided by staleness equals hard sync: error at most .03 above that of hard sync",
            f"{spread(aware, '+.3f')}, hard sync {level:.3f}",
            max(aware) <= 0.03,
        ),
        Claim(
            "staleness of s-softsync is s on average, within 10 %",
            f"{spread(taus, '.2f')} of s",
            all(abs(tau - 1) <= 0.1 for tau in taus),
        ),
    ]


def figure(results: Sequence[Trained]) -> Figure:
    """Draw the mean test error against staleness; the bands reach from the best seed to the worst."""
    from psgd.monitoring.plots import Curve, curves

    s = _staleness(results)
    series = []
    for method in (FIXED, AWARE, HARD):
        errors = [_errors(results, method, 0 if method == HARD else value) for value in s]
        low, middle, high = ([one(values) for values in errors] for one in (min, mean, max))
        series.append(Curve(method, s, middle, low, high))
    return curves(series, "s of softsync, the mean staleness", "test error")


def _staleness(results: Sequence[Trained]) -> list[int]:
    return sorted({one.s for one in results} - {0})


def _errors(results: Sequence[Trained], method: str, s: int) -> list[float]:
    return [one.test_error for one in results if one.method == method and one.s == s]
