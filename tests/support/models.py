"""Models of digits that break a promise, for `verify` to find."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import Any

from numpy.typing import NDArray

from psgd_workers.messages import FloatArray
from psgd_workers.models.numpy.network import Network

__all__ = ["Restless", "Wrong"]


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
