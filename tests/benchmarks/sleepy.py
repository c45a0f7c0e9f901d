"""A model whose gradients take seeded times, most of which it sleeps; workers import it by name."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from psgd_workers.messages import FloatArray
from psgd_workers.models.network import Network

__all__ = ["Sleepy", "delay_s"]

START_S = 120.0  # until all workers are there
LOOK_S = 0.02


def delay_s(seed: int, scale_s: float) -> float:
    """Log-normal, of deviation 1: now and then a batch takes ten times as long as most."""
    return scale_s * float(np.random.default_rng(seed).lognormal(0.0, 1.0))


class Sleepy(Network):
    """An MLP of digits.

    Args:
        hidden: units.
        scale_s: median seconds of a gradient.
        workers: how many there are; the first gradient of each waits for all of them.
        meeting: folder in which they meet.
    """

    def __init__(self, hidden: int, scale_s: float, workers: int, meeting: str) -> None:
        super().__init__((64, hidden, 10), "cross_entropy")
        self._scale_s = scale_s
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
        time.sleep(delay_s(seed, self._scale_s))
        return super().loss_and_gradient(weights, features, labels, gradient, seed)

    def _meet(self) -> None:
        """A start together: processes come up one after the other, which no mode has to answer for."""
        (self._meeting / str(os.getpid())).touch()
        deadline = time.monotonic() + START_S
        while len(list(self._meeting.iterdir())) < self._workers:
            if time.monotonic() > deadline:
                raise TimeoutError(f"not all {self._workers} workers came within {START_S} s")
            time.sleep(LOOK_S)
        self._met = True
