"""Models that fail or take their time on purpose; workers import them by name."""

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

__all__ = ["dies_once", "mnist", "poisoned", "raises", "slow"]


class _Digits(Network):
    """A softmax regression of digits that does something before each gradient."""

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
    """It fails at its n-th gradient, counted per process.

    The driver's trial gradient counts too, so `at` is beyond it.
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
    """The first process to get there is killed; a marker file tells the others."""

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
    """A process is killed at its `at`-th gradient, unless the marker file says that one was."""
    return _DiesOnce(at, marker)


def raises(at: int) -> _Raises:
    """The model raises at a process's `at`-th gradient."""
    return _Raises(at)


class _Slow(_Digits):
    """Its gradient takes so many seconds, without a core's work."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    def before(self, features: FloatArray) -> None:
        time.sleep(self._seconds)


def slow(seconds: float) -> _Slow:
    """Each gradient takes so long."""
    return _Slow(seconds)


class _SlowMnist(Network):
    """An MLP of MNIST whose gradient takes so many seconds, most of them without a core's work."""

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


def mnist(seconds: float) -> _SlowMnist:
    """Each gradient takes a bit longer than that."""
    return _SlowMnist(seconds)


class _Poisoned(_Digits):
    """Its process dies of the batch with that row of the data set."""

    def __init__(self, row: int) -> None:
        super().__init__()
        self._row = load_digits().data[row] / 16  # as `normalize: unit` makes it

    def before(self, features: FloatArray) -> None:
        # The driver tries the first batch, too, which therefore must not have the row.
        if np.isclose(features, self._row).all(axis=1).any():
            os.kill(os.getpid(), signal.SIGKILL)


def poisoned(row: int) -> _Poisoned:
    """Whoever backpropagates that example is killed."""
    return _Poisoned(row)
