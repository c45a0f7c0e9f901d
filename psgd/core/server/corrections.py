"""Corrections: what staleness does to a gradient. τ is the staleness, n the job's workers, w the weights now.

A correction may change the rate of a gradient (`factor`), its values (`correct`), and the weights that workers are
shown (`published`). What is kept by worker does not outlive a restart: its workers are new to the server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from psgd.core.server.optimizers import Watch
from psgd.core.server.state import Vectors
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
    """One correction, for the trained values `[size]` of one partition."""

    rate: float  # η of the optimizer, before its schedule; the server sets it when it changes
    elementwise: bool  # whether `correct` changes values
    shifts: bool  # whether `published` differs from the weights

    def factor(self, gradient: Gradient, staleness: int) -> float:
        """What the rate of the gradient is multiplied by; called once for each gradient that enters a round."""

    def correct(
        self, worker: str, values: FloatArray, weights: FloatArray, weights_read: FloatArray | None
    ) -> FloatArray:
        """The gradient to step on, given `values`, which are left as they are; it may be memory of the correction's."""

    def watch(self) -> Watch | None:
        """What is to be shown the direction of the step that now begins, if anything; called once for each step."""

    def published(self, weights: FloatArray, rate: float, out: FloatArray) -> None:
        """Write what workers are shown."""

    def leave(self, worker: str) -> None:
        """The worker is idle, gone or dead."""

    def vectors(self, workers: int) -> Vectors:
        """Return how many vectors the correction keeps with so many workers."""

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Arrays, and plain JSON values, to go on from."""

    def load(self, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]) -> None:
        """Take over what `state()` gave."""


class Plain:
    """No correction; the others change what they must."""

    rate = 0.0
    elementwise = False
    shifts = False

    def factor(self, gradient: Gradient, staleness: int) -> float:
        """1."""
        return 1.0

    def correct(
        self, worker: str, values: FloatArray, weights: FloatArray, weights_read: FloatArray | None
    ) -> FloatArray:
        """The values themselves."""
        return values

    def watch(self) -> Watch | None:
        """Nothing is learned from a direction."""
        return None

    def published(self, weights: FloatArray, rate: float, out: FloatArray) -> None:
        """The weights themselves."""
        out[:] = weights

    def leave(self, worker: str) -> None:
        """Nothing of it is remembered."""

    def vectors(self, workers: int) -> Vectors:
        """None."""
        return Vectors(0)

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Nothing."""
        return {}, {}

    def load(self, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]) -> None:
        """Nothing to take over."""


class StalenessLr(Plain):
    """η / max(1, τ) (Zhang et al., 2016)."""

    def factor(self, gradient: Gradient, staleness: int) -> float:
        """See above."""
        return 1 / max(1, staleness)


class DelayAdaptive(Plain):
    """η · n / max(n, τ): gradients no staler than there are workers are left alone (Mishchenko et al., 2022).

    Args:
        workers: n.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers

    def factor(self, gradient: Gradient, staleness: int) -> float:
        """See above."""
        return self._workers / max(self._workers, staleness)


class DcAsgd(Plain):
    """g + λ·g⊙g⊙(w - w_read) (Zheng et al., 2017).

    The outer product of the gradient with itself stands for the Hessian, of which only the diagonal is kept.
    `adaptive`: λ = λ₀ / √(m + 1e-7), where m is the running mean of g⊙g with decay 0.95.

    Args:
        size: length of the slice.
        strength: λ, or λ₀.
        adaptive: which of the two.
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
        """See above."""
        assert weights_read is not None, "the worker sends what it read when a correction asks for it"
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

    def vectors(self, workers: int) -> Vectors:
        """Two to compute in, and the running mean of the squares if there is one."""
        return Vectors(2) if self._squares is None else Vectors(3, 1)

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """The running mean of the squares, if there is one."""
        return ({} if self._squares is None else {"squares": self._squares.copy()}), {}

    def load(self, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]) -> None:
        """Go on with that mean."""
        if self._squares is not None and "squares" in arrays:
            self._squares[:] = arrays["squares"]


class GapAware(Plain):
    """g / (1 + |w - w_read| / C), C = η·(√m + 1e-8) (Barkai et al., 2020).

    m is the running mean, with decay 0.999 and corrected for its start at 0, of the squared update direction: C is how
    far a usual step at the highest rate takes a weight. This buys robustness to high rates, not speed.

    Args:
        size: length of the slice.
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
        """See above; before the first step there is no gap and no C."""
        assert weights_read is not None, "the worker sends what it read when a correction asks for it"
        if not self._steps:
            return values
        out = self._corrected
        usual = self._scratch
        np.divide(self._squares, 1 - self.DECAY**self._steps, out=usual)
        np.sqrt(usual, out=usual)
        usual += self.EPS
        usual *= self.rate
        np.subtract(weights, weights_read, out=out)
        np.abs(out, out=out)
        out /= usual
        out += 1
        return np.divide(values, out, out=out)

    def watch(self) -> Watch | None:
        """What lets the direction's square enter the running mean."""
        self._steps += 1
        return self._average

    def _average(self, part: slice, direction: FloatArray) -> None:
        squares = self._squares[part]
        scratch = self._scratch[: len(direction)]
        np.multiply(direction, direction, out=scratch)
        scratch *= 1 - self.DECAY
        squares *= self.DECAY
        squares += scratch

    def vectors(self, workers: int) -> Vectors:
        """Two to compute in, and the running mean."""
        return Vectors(3, 1)

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """The running mean, and of how many steps it is."""
        return {"squares": self._squares.copy()}, {"steps": self._steps}

    def load(self, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]) -> None:
        """Go on with that mean."""
        if metadata:
            self._squares[:] = arrays["squares"]
            self._steps = int(metadata["steps"])


class Dana(Plain):
    """vᵢ ← μ·vᵢ + g; w ← w - η·vᵢ; workers are shown w - η·μ·Σⱼ vⱼ (Hakimi et al., 2019).

    A worker that leaves takes its vᵢ out of the sum; should it come back, it begins at 0.

    Args:
        size: length of the slice.
        momentum: μ.
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
        """The worker's velocity."""
        velocity = self._velocities.get(worker)
        if velocity is None:
            velocity = self._velocities[worker] = np.zeros(self._size, np.float32)
        self._sum -= velocity
        velocity *= self._momentum
        velocity += values
        self._sum += velocity
        return velocity

    def published(self, weights: FloatArray, rate: float, out: FloatArray) -> None:
        """Where the momenta will have taken the weights."""
        np.multiply(self._sum, rate * self._momentum, out=self._scratch)
        np.subtract(weights, self._scratch, out=out)

    def leave(self, worker: str) -> None:
        """Take its velocity out; the sum is formed anew, so that no rounding stays behind."""
        if self._velocities.pop(worker, None) is not None:
            self._sum[:] = 0
            for velocity in self._velocities.values():
                self._sum += velocity

    def vectors(self, workers: int) -> Vectors:
        """A velocity for each worker, their sum, and one to compute in."""
        return Vectors(workers + 2)

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Nothing: the workers of a restored server are new to it."""
        return {}, {}


class Rescaled(Plain):
    """ηᵢ = η · tᵢ / mean t, where tᵢ is worker i's mean compute time (Mahran et al., 2026).

    A worker that computes twice as fast pushes twice as often, and each of its gradients counts half.
    """

    def __init__(self) -> None:
        self._totals: dict[str, tuple[float, int]] = {}

    def factor(self, gradient: Gradient, staleness: int) -> float:
        """See above, this gradient included."""
        seconds, number = self._totals.get(gradient.worker, (0.0, 0))
        # In float32, as the journal keeps it, so that a replay computes the same factor.
        self._totals[gradient.worker] = seconds + float(np.float32(gradient.compute_s)), number + 1
        means = {worker: total / count for worker, (total, count) in self._totals.items()}
        usual = sum(means.values()) / len(means)
        return means[gradient.worker] / usual if usual > 0 else 1.0

    def leave(self, worker: str) -> None:
        """Forget its times."""
        self._totals.pop(worker, None)


def build_correction(spec: JobSpec, size: int) -> Correction:
    """The correction that a job asks for, for a slice of `size` trained values."""
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
