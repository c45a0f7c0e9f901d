"""Update rules on a flat slice of the weights: each says the direction u of the step w ← w - η·u.

The rate η is the caller's: it follows a schedule, and the consistency mode may scale it.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from psgd.spec import (
    AdagradOptimizer,
    AdamOptimizer,
    AdamwOptimizer,
    DelayedNesterovOptimizer,
    OptimizerSpec,
    SgdOptimizer,
)
from psgd_workers.messages import FloatArray

__all__ = ["Adagrad", "Adam", "DelayedNesterov", "Optimizer", "Sgd", "apply", "build_optimizer"]


class Optimizer(Protocol):
    """Turns gradients into directions, and can be saved and restored."""

    def direction(self, weights: FloatArray, gradient: FloatArray) -> FloatArray:
        """u, so that the step is w ← w - η·u.

        Args:
            weights: `[size]`, before the step.
            gradient: `[size]`, left as it is: it may be shared, read-only memory.

        Returns:
            `[size]`, only to be read: `gradient` itself, or an array that the next call overwrites.
        """

    def state(self) -> dict[str, NDArray[Any]]:
        """The arrays that, loaded, make the next direction the same. The optimizer goes on writing to them."""

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Take over the arrays of `state()`, copied."""


def apply(weights: FloatArray, direction: FloatArray, rate: float, scratch: FloatArray) -> None:
    """w ← w - η·u, in place; `scratch` is overwritten. All are `[size]`."""
    np.multiply(direction, rate, out=scratch)
    weights -= scratch


class Sgd:
    """Stochastic gradient descent, equal to `torch.optim.SGD`.

    g ← g + λ·w;  v ← μ·v + (1 - dampening)·g, the first v being g itself;  u = v, or g + μ·v with nesterov.

    Args:
        spec: the hyperparameters.
        size: length of the slice.
    """

    def __init__(self, spec: SgdOptimizer, size: int) -> None:
        self._spec = spec
        self._scratch = np.empty(size if spec.momentum else 0, np.float32)
        self._direction = np.empty(size if spec.weight_decay or spec.nesterov else 0, np.float32)
        self._velocity: FloatArray | None = None

    def direction(self, weights: FloatArray, gradient: FloatArray) -> FloatArray:
        """u of the rule above."""
        spec = self._spec
        gradient = _decayed(weights, gradient, spec.weight_decay, self._direction)
        if not spec.momentum:
            return gradient
        velocity = self._accelerate(gradient)
        if not spec.nesterov:
            return velocity
        np.multiply(velocity, spec.momentum, out=self._scratch)
        return np.add(gradient, self._scratch, out=self._direction)

    def _accelerate(self, gradient: FloatArray) -> FloatArray:
        if self._velocity is None:
            self._velocity = gradient.copy()
            return self._velocity
        np.multiply(gradient, 1 - self._spec.dampening, out=self._scratch)
        self._velocity *= self._spec.momentum
        self._velocity += self._scratch
        return self._velocity

    def state(self) -> dict[str, NDArray[Any]]:
        """`velocity` `[size]`, once there is one."""
        return {} if self._velocity is None else {"velocity": self._velocity}

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Take over the arrays of `state()`, copied."""
        velocity = state.get("velocity")
        self._velocity = None if velocity is None else velocity.astype(np.float32, copy=True)


class Adagrad:
    """Adagrad (Duchi et al., 2011), as Downpour SGD's servers run it (Dean et al., 2012).

    g ← g + λ·w;  s ← s + g²;  u = g / √(s + ε).

    ε is inside the root, as in Keras; `torch.optim.Adagrad` has g / (√s + ε).

    Args:
        spec: the hyperparameters.
        size: length of the slice.
    """

    def __init__(self, spec: AdagradOptimizer, size: int) -> None:
        self._spec = spec
        self._accumulator = np.full(size, spec.initial_accumulator_value, np.float32)
        self._direction = np.empty(size, np.float32)
        self._decayed = np.empty(size if spec.weight_decay else 0, np.float32)

    def direction(self, weights: FloatArray, gradient: FloatArray) -> FloatArray:
        """u of the rule above."""
        gradient = _decayed(weights, gradient, self._spec.weight_decay, self._decayed)
        direction = np.multiply(gradient, gradient, out=self._direction)
        self._accumulator += direction
        np.add(self._accumulator, self._spec.eps, out=direction)
        np.sqrt(direction, out=direction)
        return np.divide(gradient, direction, out=direction)

    def state(self) -> dict[str, NDArray[Any]]:
        """`accumulator` `[size]`: s."""
        return {"accumulator": self._accumulator}

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Take over the arrays of `state()`, copied."""
        np.copyto(self._accumulator, state["accumulator"])


class Adam:
    """Adam and AdamW, equal to `torch.optim.Adam` and `torch.optim.AdamW`.

    m ← β₁·m + (1 - β₁)·g;  v ← β₂·v + (1 - β₂)·g²;  u = (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + ε), at the t-th step.
    Adam decays the gradient, g ← g + λ·w, before all that; AdamW the weights, u ← u + λ·w, after it.

    Args:
        spec: the hyperparameters.
        size: length of the slice.

    References:
        Kingma & Ba, 2015: Adam. Loshchilov & Hutter, 2019: Decoupled weight decay regularization.
    """

    def __init__(self, spec: AdamOptimizer | AdamwOptimizer, size: int) -> None:
        self._spec = spec
        self._decoupled = isinstance(spec, AdamwOptimizer)
        self._steps = np.zeros(1, np.int64)
        self._mean = np.zeros(size, np.float32)
        self._square = np.zeros(size, np.float32)
        self._direction = np.empty(size, np.float32)
        self._scratch = np.empty(size, np.float32)

    def direction(self, weights: FloatArray, gradient: FloatArray) -> FloatArray:
        """u of the rule above."""
        spec = self._spec
        if not self._decoupled:
            gradient = _decayed(weights, gradient, spec.weight_decay, self._direction)
        self._average(gradient)
        direction = self._normalize()
        if self._decoupled:
            np.multiply(weights, spec.weight_decay, out=self._scratch)
            direction += self._scratch
        return direction

    def _average(self, gradient: FloatArray) -> None:
        (beta_mean, beta_square), scratch = self._spec.betas, self._scratch
        self._steps += 1
        np.multiply(gradient, 1 - beta_mean, out=scratch)
        self._mean *= beta_mean
        self._mean += scratch
        np.multiply(gradient, gradient, out=scratch)
        scratch *= 1 - beta_square
        self._square *= beta_square
        self._square += scratch

    def _normalize(self) -> FloatArray:
        """The bias-corrected mean over the root of the bias-corrected square."""
        steps = int(self._steps[0])
        mean_weight, square_weight = (1 - beta**steps for beta in self._spec.betas)  # of what was averaged so far
        direction = np.sqrt(self._square, out=self._direction)
        direction /= sqrt(square_weight)
        direction += self._spec.eps
        np.divide(self._mean, direction, out=direction)
        direction /= mean_weight
        return direction

    def state(self) -> dict[str, NDArray[Any]]:
        """`mean` and `square` `[size]`: m and v; `steps` `[1]`, int64: t."""
        return {"mean": self._mean, "square": self._square, "steps": self._steps}

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Take over the arrays of `state()`, copied."""
        for name, array in self.state().items():
            np.copyto(array, state[name])


class DelayedNesterov:
    """Delayed Nesterov: the momentum moves on every N-th push only, by the mean of the last N gradients.

    u = g / N;  on each N-th push also m ← β·m + ḡ and u ← u + β·m.

    With N = 1 it is `Sgd` with nesterov.

    Args:
        spec: the hyperparameters.
        size: length of the slice.

    References:
        Liu et al., 2024: Asynchronous Local-SGD training for language modeling (algorithm 3, with c = 0).
    """

    def __init__(self, spec: DelayedNesterovOptimizer, size: int) -> None:
        self._spec = spec
        self._pushes = np.zeros(1, np.int64)
        self._sum = np.zeros(size, np.float32)
        self._velocity = np.zeros(size, np.float32)
        self._direction = np.empty(size, np.float32)

    def direction(self, weights: FloatArray, gradient: FloatArray) -> FloatArray:
        """u of the rule above."""
        del weights
        self._sum += gradient
        self._pushes += 1
        np.divide(gradient, self._spec.every, out=self._direction)
        if self._pushes[0] == self._spec.every:
            self._accelerate()
        return self._direction

    def _accelerate(self) -> None:
        self._sum /= self._spec.every
        self._velocity *= self._spec.momentum
        self._velocity += self._sum
        np.multiply(self._velocity, self._spec.momentum, out=self._sum)
        self._direction += self._sum
        self._sum[:] = 0
        self._pushes[:] = 0

    def state(self) -> dict[str, NDArray[Any]]:
        """`velocity` and `sum` `[size]`: m and Σg since it moved; `pushes` `[1]`, int64: how many those are."""
        return {"velocity": self._velocity, "sum": self._sum, "pushes": self._pushes}

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Take over the arrays of `state()`, copied."""
        for name, array in self.state().items():
            np.copyto(array, state[name])


def _decayed(weights: FloatArray, gradient: FloatArray, weight_decay: float, out: FloatArray) -> FloatArray:
    """g + λ·w, in `out`; g itself if λ is 0."""
    if not weight_decay:
        return gradient
    np.multiply(weights, weight_decay, out=out)
    out += gradient
    return out


def build_optimizer(spec: OptimizerSpec, size: int) -> Optimizer:
    """The optimizer that a job asks for, for a slice of `size` values."""
    match spec:
        case SgdOptimizer():
            return Sgd(spec, size)
        case AdagradOptimizer():
            return Adagrad(spec, size)
        case AdamOptimizer() | AdamwOptimizer():
            return Adam(spec, size)
        case DelayedNesterovOptimizer():
            return DelayedNesterov(spec, size)
