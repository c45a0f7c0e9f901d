"""Models that sleep before each gradient, for a time that the model chooses. Workers import them by name."""

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

__all__ = ["LognormalSleep", "OneSlowWorker", "delay_s"]

START_S = 120.0  # time limit for the start of all workers
POLL_S = 0.02


def delay_s(seed: int, scale_s: float) -> float:
    """Draw a log-normal time of deviation 1 and median `scale_s`: a few batches take ten times as long as most."""
    return scale_s * float(np.random.default_rng(seed).lognormal(0.0, 1.0))


class _SleepingNetwork(Network, ABC):
    """An MLP for ten classes that sleeps before each gradient.

    Args:
        inputs: features of an example.
        hidden: units of the hidden layer.
        workers: number of workers; the first gradient of each worker waits until all workers have started.
        barrier: folder in which each worker leaves a file when it starts.
    """

    def __init__(self, inputs: int, hidden: int, workers: int, barrier: str) -> None:
        super().__init__((inputs, hidden, 10), "cross_entropy")
        self._workers = workers
        self._barrier = Path(barrier)
        self._passed = ray.get_runtime_context().get_actor_id() is None if ray.is_initialized() else True

    def loss_and_gradient(
        self,
        weights: Mapping[str, FloatArray],
        features: FloatArray,
        labels: NDArray[Any],
        gradient: Mapping[str, FloatArray],
        seed: int,
    ) -> float:
        if not self._passed:
            self._wait_for_all()
        time.sleep(self._sleep_s(seed))
        return super().loss_and_gradient(weights, features, labels, gradient, seed)

    @abstractmethod
    def _sleep_s(self, seed: int) -> float:
        """Return the seconds to sleep for the batch of that seed."""

    def _wait_for_all(self) -> None:
        """Wait until all workers have started, so that the order of their starts does not count for a mode."""
        (self._barrier / str(os.getpid())).touch()
        deadline = time.monotonic() + START_S
        while len(list(self._barrier.iterdir())) < self._workers:
            if time.monotonic() > deadline:
                raise TimeoutError(f"not all {self._workers} workers started within {START_S} s")
            time.sleep(POLL_S)
        self._passed = True


class LognormalSleep(_SleepingNetwork):
    """A model on digits whose sleeps are log-normal and depend on the batch's seed.

    Args:
        hidden: units of the hidden layer.
        scale_s: median sleep, in seconds.
        workers: number of workers.
        barrier: folder in which each worker leaves a file when it starts.
    """

    def __init__(self, hidden: int, scale_s: float, workers: int, barrier: str) -> None:
        super().__init__(64, hidden, workers, barrier)
        self._scale_s = scale_s

    def _sleep_s(self, seed: int) -> float:
        return delay_s(seed, self._scale_s)


class OneSlowWorker(_SleepingNetwork):
    """A model that sleeps the same time for every gradient, except on one worker.

    Args:
        inputs: features of an example.
        hidden: units of the hidden layer.
        sleep_s: sleep for each gradient, in seconds.
        slow_s: the same for the slow worker, which is the one with the least process id.
        workers: number of workers.
        barrier: folder in which each worker leaves a file when it starts.
    """

    def __init__(self, inputs: int, hidden: int, sleep_s: float, slow_s: float, workers: int, barrier: str) -> None:
        super().__init__(inputs, hidden, workers, barrier)
        self._sleeps = sleep_s
        self._slow_s = slow_s

    def _sleep_s(self, seed: int) -> float:
        return self._sleeps

    def _wait_for_all(self) -> None:
        super()._wait_for_all()
        if os.getpid() == min(int(file.name) for file in self._barrier.iterdir()):
            self._sleeps = self._slow_s
