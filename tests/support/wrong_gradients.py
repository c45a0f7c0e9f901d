"""Models on digits whose gradients break a rule of the `Model` protocol, for `psgd verify` and the trial to find."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psgd_workers.messages import FloatArray
from psgd_workers.models.numpy.network import Network

__all__ = ["Accumulates", "NanGradient", "Nondeterministic", "ScaledRow", "SkipsBias", "ZeroGradient"]


class _Wrong(Network):
    """A softmax regression on digits whose gradient passes through `write`."""

    def __init__(self) -> None:
        super().__init__((64, 10), "cross_entropy")

    def loss_and_gradient(
        self,
        weights: Mapping[str, FloatArray],
        features: FloatArray,
        labels: NDArray[Any],
        gradient: Mapping[str, FloatArray],
        seed: int,
    ) -> float:
        right = {name: array.copy() for name, array in gradient.items()}
        loss = super().loss_and_gradient(weights, features, labels, right, seed)
        self.write(right, gradient)
        return loss

    def write(self, right: Mapping[str, FloatArray], gradient: Mapping[str, FloatArray]) -> None:
        """Write into `gradient` what the model makes of the right gradient."""
        raise NotImplementedError


class ScaledRow(_Wrong):
    """A model whose gradient is 1.5 times the right one in one of ten rows."""

    def write(self, right: Mapping[str, FloatArray], gradient: Mapping[str, FloatArray]) -> None:
        for name, array in right.items():
            gradient[name][:] = array
        gradient["layers.0.weight"][3] *= 1.5


class Nondeterministic(_Wrong):
    """A model whose gradient grows a little with each call."""

    def __init__(self) -> None:
        super().__init__()
        self._calls = count()

    def write(self, right: Mapping[str, FloatArray], gradient: Mapping[str, FloatArray]) -> None:
        for name, array in right.items():
            gradient[name][:] = array
        gradient["layers.0.weight"][:] *= 1 + 1e-4 * next(self._calls)


class SkipsBias(_Wrong):
    """A model that does not write the gradient of its bias."""

    def write(self, right: Mapping[str, FloatArray], gradient: Mapping[str, FloatArray]) -> None:
        gradient["layers.0.weight"][:] = right["layers.0.weight"]


class Accumulates(_Wrong):
    """A model that adds to the gradient array instead of overwriting it."""

    def write(self, right: Mapping[str, FloatArray], gradient: Mapping[str, FloatArray]) -> None:
        for name, array in right.items():
            gradient[name][:] += array


class ZeroGradient(_Wrong):
    """A model whose gradient is zero."""

    def write(self, right: Mapping[str, FloatArray], gradient: Mapping[str, FloatArray]) -> None:
        for array in gradient.values():
            array[:] = 0


class NanGradient(_Wrong):
    """A model whose gradient is NaN."""

    def write(self, right: Mapping[str, FloatArray], gradient: Mapping[str, FloatArray]) -> None:
        for array in gradient.values():
            array[:] = np.nan
