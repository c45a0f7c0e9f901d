"""Models that fail or are slow on purpose. Workers import them by name."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from psgd_workers.messages import FloatArray
from psgd_workers.models.numpy.network import Network

__all__ = ["dies_once", "poisoned", "raises", "slow", "slow_mnist"]


class _Digits(Network):
    """A softmax regression on digits that calls `before` before each gradient."""

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
        self.before(features)
        return super().loss_and_gradient(weights, features, labels, gradient, seed)

    def before(self, features: FloatArray) -> None:
        raise NotImplementedError


class _Scripted(_Digits):
    """A model that fails at its `at`-th gradient, counted in each process from 1.

    The trial gradients in the driver count, too: `at` must be above their number, unless the trial is to fail.
    """

    def __init__(self, at: int) -> None:
        super().__init__()
        self._left = at

    def before(self, features: FloatArray) -> None:
        self._left -= 1
        if self._left == 0:
            self.fail()

    def fail(self) -> None:
        raise NotImplementedError


class _DiesOnce(_Scripted):
    """A model that kills the first process that reaches the gradient; a marker file spares the others."""

    def __init__(self, at: int, marker: str) -> None:
        super().__init__(at)
        self._marker = Path(marker)

    def fail(self) -> None:
        try:
            self._marker.touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)


class _Raises(_Scripted):
    def fail(self) -> None:
        raise ArithmeticError("scripted")


def dies_once(at: int, marker: str) -> _DiesOnce:
    """Return a model that kills its process at the `at`-th gradient, unless the marker file exists already."""
    return _DiesOnce(at, marker)


def raises(at: int) -> _Raises:
    """Return a model that raises at the `at`-th gradient of a process."""
    return _Raises(at)


class _Slow(_Digits):
    """A model that sleeps before each gradient."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    def before(self, features: FloatArray) -> None:
        time.sleep(self._seconds)


def slow(seconds: float) -> _Slow:
    """Return a model on digits that sleeps `seconds` before each gradient."""
    return _Slow(seconds)


class _SlowMnist(Network):
    """An MLP on MNIST that sleeps before each gradient."""

    def __init__(self, seconds: float) -> None:
        super().__init__((784, 32, 10), "cross_entropy")
        self._seconds = seconds

    def loss_and_gradient(
        self,
        weights: Mapping[str, FloatArray],
        features: FloatArray,
        labels: NDArray[Any],
        gradient: Mapping[str, FloatArray],
        seed: int,
    ) -> float:
        time.sleep(self._seconds)
        return super().loss_and_gradient(weights, features, labels, gradient, seed)


def slow_mnist(seconds: float) -> _SlowMnist:
    """Return a model on MNIST that sleeps `seconds` before each gradient."""
    return _SlowMnist(seconds)


class _Poisoned(_Digits):
    """A model that kills its process at every batch that contains one row of the data set."""

    def __init__(self, row: int) -> None:
        super().__init__()
        self._row = load_digits().data[row] / 16  # scaled as by `normalize: unit`

    def before(self, features: FloatArray) -> None:
        # The trial in the driver computes the first batch, which therefore must not contain the row.
        if np.isclose(features, self._row).all(axis=1).any():
            os.kill(os.getpid(), signal.SIGKILL)


def poisoned(row: int) -> _Poisoned:
    """Return a model that kills every process that backpropagates the example of that row."""
    return _Poisoned(row)
