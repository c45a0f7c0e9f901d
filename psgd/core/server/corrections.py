"""Corrections for stale gradients. In the formulas, τ is the staleness, n the job's workers and w the present weights.

A correction may change the rate of a gradient (`factor`), its values (`correct`), and the weights that workers pull
(`publish`). Statistics of single workers are not saved: to a restored server all workers are new.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from psgd.core.server.live_worker import LiveWorker
from psgd.core.server.optimizers import Watch
from psgd.core.server.state import VectorCounts
from psgd.spec import (
    CorrectionSpec,
    DanaCorrection,
    DcAsgdCorrection,
    DelayAdaptiveCorrection,
    GapAwareCorrection,
    JobSpec,
    NoCorrection,
    RescaledCorrection,
    StalenessLrCorrection,
)
from psgd_workers.messages import FloatArray, Gradient

__all__ = ["Correction", "build_correction"]


class Correction(Protocol):
    """Interface of the corrections of a server, for the trained values `[size]` of its partition."""

    rate: float  # η of the optimizer before its schedule; set by the server whenever the settings change
    elementwise: bool  # True if `correct` changes values
    shifts: bool  # True if workers pull other weights than the optimizer updates

    def factor(self, gradient: Gradient, staleness: int, worker: LiveWorker | None) -> float:
        """Return the factor of the gradient's rate. Called once for each gradient that enters a round.

        Args:
            gradient: the gradient.
            staleness: its staleness.
            worker: the worker that computed it; None: it has no lease any more.
        """

    def correct(
        self, worker: str, values: FloatArray, weights: FloatArray, weights_read: FloatArray | None
    ) -> FloatArray:
        """Return the corrected gradient. Called once for each gradient that enters a round.

        Args:
            worker: name of the worker that computed the gradient.
            values: `[size]`, the gradient after clipping; not modified.
            weights: `[size]`, the present weights.
            weights_read: `[size]`, the weights that the gradient was computed from; None unless the job's correction
                asks workers to send them.

        Returns:
            `[size]`. The next call may overwrite this array.
        """

    def watch(self) -> Watch | None:
        """Return a function to be called with the direction of the step that begins now, or None.

        Called once for each step.
        """

    def publish(self, weights: FloatArray, rate: float, out: FloatArray) -> None:
        """Write the weights that workers pull into `out`.

        Args:
            weights: `[size]`, the weights after a step.
            rate: η of that step, after the schedule has scaled it.
            out: `[size]`, overwritten.
        """

    def leave(self, worker: str) -> None:
        """Forget the statistics of a worker that is idle, gone or dead."""

    def vectors(self, workers: int) -> VectorCounts:
        """Return the number of vectors that the correction keeps.

        Args:
            workers: number of workers that push.
        """

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Return copies of the statistics to save, as (arrays by name, JSON values by name)."""

    def load(self, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]) -> None:
        """Restore the statistics: copy the arrays and values that `state()` returned."""


class Plain:
    """No correction. Base of the others, which override some of its methods."""

    rate = 0.0
    elementwise = False
    shifts = False

    def factor(self, gradient: Gradient, staleness: int, worker: LiveWorker | None) -> float:
        """Return 1."""
        return 1.0

    def correct(
        self, worker: str, values: FloatArray, weights: FloatArray, weights_read: FloatArray | None
    ) -> FloatArray:
        """Return the values as given."""
        return values

    def watch(self) -> Watch | None:
        """Return None: the direction of a step is not needed."""
        return None

    def publish(self, weights: FloatArray, rate: float, out: FloatArray) -> None:
        """Copy the weights."""
        out[:] = weights

    def leave(self, worker: str) -> None:
        """No-op: there are no statistics of single workers."""

    def vectors(self, workers: int) -> VectorCounts:
        """Count no vector."""
        return VectorCounts(0)

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Return nothing."""
        return {}, {}

    def load(self, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]) -> None:
        """No-op: the state is empty."""


class StalenessLr(Plain):
    """Rate η / max(1, τ) (Zhang et al., 2016)."""

    def factor(self, gradient: Gradient, staleness: int, worker: LiveWorker | None) -> float:
        """Return 1 / max(1, τ)."""
        return 1 / max(1, staleness)


class DelayAdaptive(Plain):
    """Rate η · n / max(n, τ) (Mishchenko et al., 2022): only gradients with τ > n get a lower rate.

    Args:
        workers: number of workers, n.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers

    def factor(self, gradient: Gradient, staleness: int, worker: LiveWorker | None) -> float:
        """Return n / max(n, τ)."""
        return self._workers / max(self._workers, staleness)


class DcAsgd(Plain):
    """Delay-compensated ASGD (Zheng et al., 2017): g + λ·g⊙g⊙(w - w_read).

    This is a Taylor expansion of the gradient around w_read. The diagonal of the outer product of the gradient with
    itself, g⊙g, approximates the Hessian. If `adaptive`, λ = λ₀ / √(m + 1e-7), where m is the running mean of g⊙g
    with decay 0.95.

    Args:
        size: number of trained values.
        strength: λ; λ₀ if `adaptive`. Higher → stronger correction.
        adaptive: True to divide λ₀ by the root of the running mean.
    """

    elementwise = True
    DECAY = 0.95
    EPS = 1e-7

    def __init__(self, size: int, strength: float, adaptive: bool) -> None:
        self._strength = strength
        self._squares = np.zeros(size, np.float32) if adaptive else None
        self._corrected = np.empty(size, np.float32)
        self._scratch = np.empty(size, np.float32)

    def correct(
        self, worker: str, values: FloatArray, weights: FloatArray, weights_read: FloatArray | None
    ) -> FloatArray:
        """Return g + λ·g⊙g⊙(w - w_read)."""
        assert weights_read is not None, "this correction needs the weights read, but the worker did not send them"
        out = self._corrected
        scratch = self._scratch
        np.multiply(values, values, out=out)
        if self._squares is None:
            out *= self._strength
        else:
            self._squares *= self.DECAY
            self._squares += np.multiply(out, 1 - self.DECAY, out=scratch)
            np.add(self._squares, self.EPS, out=scratch)
            out /= np.sqrt(scratch, out=scratch)
            out *= self._strength
        out *= np.subtract(weights, weights_read, out=scratch)
        out += values
        return out

    def vectors(self, workers: int) -> VectorCounts:
        """Count two scratch vectors and, if adaptive, the running mean. Only the running mean is saved."""
        return VectorCounts(2) if self._squares is None else VectorCounts(3, 1)

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Return `squares` `[size]`, the running mean, if adaptive."""
        return ({} if self._squares is None else {"squares": self._squares.copy()}), {}

    def load(self, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]) -> None:
        """Restore the running mean."""
        if self._squares is not None and "squares" in arrays:
            self._squares[:] = arrays["squares"]


class GapAware(Plain):
    """Gap-aware ASGD (Barkai et al., 2020): g / (1 + |w - w_read| / C), with C = η·(√m + 1e-8).

    m is the running mean of the squared update direction, with decay 0.999 and corrected for its start at 0. C is thus
    the usual change of a weight in one step at the rate η. The correction makes high rates stable; it does not make
    training faster.

    Args:
        size: number of trained values.
    """

    elementwise = True
    DECAY = 0.999
    EPS = 1e-8

    def __init__(self, size: int) -> None:
        self._squares = np.zeros(size, np.float32)
        self._steps = 0
        self._corrected = np.empty(size, np.float32)
        self._scratch = np.empty(size, np.float32)

    def correct(
        self, worker: str, values: FloatArray, weights: FloatArray, weights_read: FloatArray | None
    ) -> FloatArray:
        """Return g / (1 + |w - w_read| / C); g before the first step, when there is no C."""
        assert weights_read is not None, "this correction needs the weights read, but the worker did not send them"
        if not self._steps:
            return values
        out = self._corrected
        usual_change = self._scratch
        np.divide(self._squares, 1 - self.DECAY**self._steps, out=usual_change)
        np.sqrt(usual_change, out=usual_change)
        usual_change += self.EPS
        usual_change *= self.rate
        np.subtract(weights, weights_read, out=out)
        np.abs(out, out=out)
        out /= usual_change
        out += 1
        return np.divide(values, out, out=out)

    def watch(self) -> Watch | None:
        """Count the step, and return the function that adds the square of its direction to the running mean."""
        self._steps += 1
        return self._add_square

    def _add_square(self, part: slice, direction: FloatArray) -> None:
        squares = self._squares[part]
        scratch = self._scratch[: len(direction)]
        np.multiply(direction, direction, out=scratch)
        scratch *= 1 - self.DECAY
        squares *= self.DECAY
        squares += scratch

    def vectors(self, workers: int) -> VectorCounts:
        """Count two scratch vectors and the running mean. Only the running mean is saved."""
        return VectorCounts(3, 1)

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Return `squares` `[size]`, the running mean, and its number of `steps`."""
        return {"squares": self._squares.copy()}, {"steps": self._steps}

    def load(self, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]) -> None:
        """Restore the running mean."""
        if metadata:
            self._squares[:] = arrays["squares"]
            self._steps = int(metadata["steps"])


class Dana(Plain):
    """DANA (Hakimi et al., 2019): a momentum for each worker, and a look-ahead along the sum of all of them.

    For a gradient g of worker i: vᵢ ← μ·vᵢ + g, then w ← w - η·vᵢ. Workers pull w - η·μ·Σⱼ vⱼ.

    The vᵢ of a worker that leaves is removed from the sum. If the worker joins again, its vᵢ starts at 0.

    Args:
        size: number of trained values.
        momentum: μ, the share of a velocity that is kept at each gradient of its worker.
    """

    elementwise = True
    shifts = True

    def __init__(self, size: int, momentum: float) -> None:
        self._momentum = momentum
        self._size = size
        self._velocities: dict[str, FloatArray] = {}
        self._sum = np.zeros(size, np.float32)
        self._scratch = np.empty(size, np.float32)

    def correct(
        self, worker: str, values: FloatArray, weights: FloatArray, weights_read: FloatArray | None
    ) -> FloatArray:
        """Add the gradient to the velocity of its worker and return that velocity."""
        velocity = self._velocities.get(worker)
        if velocity is None:
            velocity = self._velocities[worker] = np.zeros(self._size, np.float32)
        self._sum -= velocity
        velocity *= self._momentum
        velocity += values
        self._sum += velocity
        return velocity

    def publish(self, weights: FloatArray, rate: float, out: FloatArray) -> None:
        """Write w - η·μ·Σⱼ vⱼ: the weights after another gradient of every worker, as far as momentum predicts them."""
        np.multiply(self._sum, rate * self._momentum, out=self._scratch)
        np.subtract(weights, self._scratch, out=out)

    def leave(self, worker: str) -> None:
        """Remove the velocity of a worker. Compute the sum anew: a subtraction would leave rounding errors in it."""
        if self._velocities.pop(worker, None) is not None:
            self._sum[:] = 0
            for velocity in self._velocities.values():
                self._sum += velocity

    def vectors(self, workers: int) -> VectorCounts:
        """Count a velocity for each worker, their sum, and a scratch vector."""
        return VectorCounts(workers + 2)

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Return nothing: to a restored server all workers are new."""
        return {}, {}


class Rescaled(Plain):
    """Rate η · tᵢ / mean t, where tᵢ is the mean computing time of worker i (Mahran et al., 2026).

    A worker that computes twice as fast pushes twice as often, and each of its gradients gets half the rate. A gradient
    of a worker that has not joined gets the full rate.

    Attributes:
        means: `[2]`, float64: sum of the workers' mean computing times, seconds; and number of these workers.
    """

    def __init__(self) -> None:
        self.means = np.zeros(2)
        self._live: dict[str, LiveWorker] = {}  # workers whose mean is in the sum

    def factor(self, gradient: Gradient, staleness: int, worker: LiveWorker | None) -> float:
        """Return tᵢ / mean t, with this gradient's time included."""
        if worker is None:
            return 1.0
        # The journal has this time as float32. A replay has to compute the same factor.
        before, after = worker.computed(float(np.float32(gradient.compute_s)))
        total, number = self.means.tolist()
        total += after - before
        if gradient.worker not in self._live:
            self._live[gradient.worker] = worker
            number += 1
        self.means[:] = total, number
        mean = total / number
        return after / mean if mean > 0 else 1.0

    def leave(self, worker: str) -> None:
        """Remove the mean of a worker. Compute the sum anew: a subtraction would leave rounding errors in it."""
        if self._live.pop(worker, None) is not None:
            self.means[:] = sum(worker.mean_s for worker in self._live.values()), len(self._live)


def build_correction(spec: JobSpec, size: int) -> Correction:
    """Build the correction of a job.

    Args:
        spec: the job to train.
        size: number of trained values of the partition.
    """
    correction = _BUILDERS[type(spec.correction)](spec.correction, spec, size)
    correction.rate = spec.optimizer.lr
    return correction


def _dc_asgd(correction: DcAsgdCorrection, spec: JobSpec, size: int) -> DcAsgd:
    adaptive = correction.variant == "adaptive"
    default = 2.0 if adaptive else 0.04
    return DcAsgd(size, default if correction.strength is None else correction.strength, adaptive)


_BUILDERS: Mapping[type[CorrectionSpec], Callable[[Any, JobSpec, int], Correction]] = {
    NoCorrection: lambda correction, spec, size: Plain(),
    StalenessLrCorrection: lambda correction, spec, size: StalenessLr(),
    DelayAdaptiveCorrection: lambda correction, spec, size: DelayAdaptive(spec.scaling.most_workers),
    DcAsgdCorrection: _dc_asgd,
    GapAwareCorrection: lambda correction, spec, size: GapAware(size),
    DanaCorrection: lambda correction, spec, size: Dana(size, correction.momentum),
    RescaledCorrection: lambda correction, spec, size: Rescaled(),
}
