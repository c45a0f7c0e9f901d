"""Models of digits that break a promise, for `verify` to find."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psgd_workers.messages import FloatArray
from psgd_workers.models.numpy.network import Network

__all__ = ["Adding", "Endless", "Flat", "Restless", "Silent", "Wrong"]


class Wrong(Network):
    """Its gradient is half as large again in one row of ten."""

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


class Restless(Network):
    """Every gradient is a little longer than the one before."""

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


class Silent(Network):
    """It leaves the gradient of its bias as it finds it."""

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


class Adding(Silent):
    """It adds to what its gradient held."""

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


class Flat(Silent):
    """Its gradient is zero."""

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


class Endless(Silent):
    """Its gradient is infinite."""

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
