"""Update rules, in place on a flat slice of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from psgd.spec import OptimizerSpec, SgdOptimizer
from psgd_workers.messages import FloatArray

__all__ = ["Optimizer", "Sgd", "build_optimizer"]


class Optimizer(Protocol):
    """Steps a slice of the weights, and can be saved and restored."""

    def step(self, weights: FloatArray, gradient: FloatArray) -> None:
        """Step `weights` in place. `gradient` is left as it is: it may be shared, read-only memory."""

    def state(self) -> dict[str, FloatArray]:
        """The arrays that, loaded, make the next step the same. The optimizer goes on writing to them."""

    def load(self, state: Mapping[str, FloatArray]) -> None: ...


class Sgd:
    """Stochastic gradient descent, equal to `torch.optim.SGD`.

    g ← g + λ·w;  v ← μ·v + (1 - dampening)·g, the first v being g itself;  w ← w - η·(v, or g + μ·v with nesterov).

    Args:
        spec: the hyperparameters.
        size: length of the slice.
    """

    def __init__(self, spec: SgdOptimizer, size: int) -> None:
        self._spec = spec
        self._size = size
        self._scratch = np.empty(size, np.float32)
        self._direction = np.empty(size, np.float32) if spec.weight_decay or spec.nesterov else self._scratch
        self._velocity: FloatArray | None = None

    def step(self, weights: FloatArray, gradient: FloatArray) -> None:
        """One step of the rule above, in place."""
        spec = self._spec
        if spec.weight_decay:
            np.multiply(weights, spec.weight_decay, out=self._direction)
            self._direction += gradient
            gradient = self._direction
        if spec.momentum:
            velocity = self._accelerate(gradient)
            if spec.nesterov:
                np.multiply(velocity, spec.momentum, out=self._scratch)
                gradient = np.add(gradient, self._scratch, out=self._direction)
            else:
                gradient = velocity
        np.multiply(gradient, spec.lr, out=self._scratch)
        weights -= self._scratch

    def _accelerate(self, gradient: FloatArray) -> FloatArray:
        if self._velocity is None:
            self._velocity = gradient.copy()
            return self._velocity
        np.multiply(gradient, 1 - self._spec.dampening, out=self._scratch)
        self._velocity *= self._spec.momentum
        self._velocity += self._scratch
        return self._velocity

    def state(self) -> dict[str, FloatArray]:
        """`velocity` `[size]`, once there is one."""
        return {} if self._velocity is None else {"velocity": self._velocity}

    def load(self, state: Mapping[str, FloatArray]) -> None:
        """Take over the arrays of `state()`, copied."""
        velocity = state.get("velocity")
        self._velocity = None if velocity is None else velocity.astype(np.float32, copy=True)


def build_optimizer(spec: OptimizerSpec, size: int) -> Optimizer:
    """The optimizer that a job asks for, for a slice of `size` values."""
    return Sgd(spec, size)
