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


class ScaledRow(Network):
    """A model whose gradient is 1.5 times the right one in one of ten rows."""

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
        loss = super().loss_and_gradient(weights, features, labels, gradient, seed)
        gradient["layers.0.weight"][3] *= 1.5
        return loss


class Nondeterministic(Network):
    """A model whose gradient grows a little with each call."""

    def __init__(self) -> None:
        super().__init__((64, 10), "cross_entropy")
        self._calls = count()

    def loss_and_gradient(
        self,
        weights: Mapping[str, FloatArray],
        features: FloatArray,
        labels: NDArray[Any],
        gradient: Mapping[str, FloatArray],
        seed: int,
    ) -> float:
        loss = super().loss_and_gradient(weights, features, labels, gradient, seed)
        gradient["layers.0.weight"][:] *= 1 + 1e-4 * next(self._calls)
        return loss


class SkipsBias(Network):
    """A model that does not write the gradient of its bias."""

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
        own = {name: array.copy() for name, array in gradient.items()}
        loss = super().loss_and_gradient(weights, features, labels, own, seed)
        gradient["layers.0.weight"][:] = own["layers.0.weight"]
        return loss


class Accumulates(SkipsBias):
    """A model that adds to the gradient array instead of overwriting it."""

    def loss_and_gradient(
        self,
        weights: Mapping[str, FloatArray],
        features: FloatArray,
        labels: NDArray[Any],
        gradient: Mapping[str, FloatArray],
        seed: int,
    ) -> float:
        own = {name: array.copy() for name, array in gradient.items()}
        loss = Network.loss_and_gradient(self, weights, features, labels, own, seed)
        for name, array in own.items():
            gradient[name][:] += array
        return loss


class ZeroGradient(SkipsBias):
    """A model whose gradient is zero."""

    def loss_and_gradient(
        self,
        weights: Mapping[str, FloatArray],
        features: FloatArray,
        labels: NDArray[Any],
        gradient: Mapping[str, FloatArray],
        seed: int,
    ) -> float:
        loss = Network.loss_and_gradient(self, weights, features, labels, gradient, seed)
        for array in gradient.values():
            array[:] = 0
        return loss


class NanGradient(SkipsBias):
    """A model whose gradient is NaN."""

    def loss_and_gradient(
        self,
        weights: Mapping[str, FloatArray],
        features: FloatArray,
        labels: NDArray[Any],
        gradient: Mapping[str, FloatArray],
        seed: int,
    ) -> float:
        loss = Network.loss_and_gradient(self, weights, features, labels, gradient, seed)
        for array in gradient.values():
            array[:] = np.nan
        return loss
