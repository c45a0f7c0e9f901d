"""Models whose gradients take times of their own, most of which they sleep; workers import them by name."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from psgd_workers.messages import FloatArray
from psgd_workers.models.numpy.network import Network

__all__ = ["OneSlow", "Sleepy", "delay_s"]

START_S = 120.0  # until all workers are there
LOOK_S = 0.02


def delay_s(seed: int, scale_s: float) -> float:
    """Log-normal, of deviation 1: now and then a batch takes ten times as long as most."""
    return scale_s * float(np.random.default_rng(seed).lognormal(0.0, 1.0))


class _Meeting(Network, ABC):
    """An MLP for ten classes, which sleeps before each gradient.

    Args:
        inputs: features of an example.
        hidden: units.
        workers: how many there are; the first gradient of each waits for all of them.
        meeting: folder in which they meet.
    """

    def __init__(self, inputs: int, hidden: int, workers: int, meeting: str) -> None:
        super().__init__((inputs, hidden, 10), "cross_entropy")
        self._workers = workers
        self._meeting = Path(meeting)
        self._met = ray.get_runtime_context().get_actor_id() is None if ray.is_initialized() else True

    def loss_and_gradient(
        self,
        weights: Mapping[str, FloatArray],
        features: FloatArray,
        labels: NDArray[Any],
        gradient: Mapping[str, FloatArray],
        seed: int,
    ) -> float:
        if not self._met:
            self._meet()
        time.sleep(self._sleep_s(seed))
        return super().loss_and_gradient(weights, features, labels, gradient, seed)

    @abstractmethod
    def _sleep_s(self, seed: int) -> float:
        """How long, for the batch of that seed."""

    def _meet(self) -> None:
        """A start together: processes come up one after the other, which no mode has to answer for."""
        (self._meeting / str(os.getpid())).touch()
        deadline = time.monotonic() + START_S
        while len(list(self._meeting.iterdir())) < self._workers:
            if time.monotonic() > deadline:
                raise TimeoutError(f"not all {self._workers} workers came within {START_S} s")
            time.sleep(LOOK_S)
        self._met = True


class Sleepy(_Meeting):
    """Seeded log-normal times; for digits.

    Args:
        hidden: units.
        scale_s: median seconds of a gradient.
        workers: how many there are.
        meeting: folder in which they meet.
    """

    def __init__(self, hidden: int, scale_s: float, workers: int, meeting: str) -> None:
        super().__init__(64, hidden, workers, meeting)
        self._scale_s = scale_s

    def _sleep_s(self, seed: int) -> float:
        return delay_s(seed, self._scale_s)


class OneSlow(_Meeting):
    """The same time for every gradient, but of one worker.

    Args:
        inputs: features of an example.
        hidden: units.
        sleep_s: seconds of a gradient.
        slow_s: likewise, of one worker, whichever that is.
        workers: how many there are.
        meeting: folder in which they meet.
    """

    def __init__(self, inputs: int, hidden: int, sleep_s: float, slow_s: float, workers: int, meeting: str) -> None:
        super().__init__(inputs, hidden, workers, meeting)
        self._sleeps = sleep_s
        self._slow_s = slow_s

    def _sleep_s(self, seed: int) -> float:
        return self._sleeps

    def _meet(self) -> None:
        super()._meet()
        if os.getpid() == min(int(file.name) for file in self._meeting.iterdir()):
            self._sleeps = self._slow_s
