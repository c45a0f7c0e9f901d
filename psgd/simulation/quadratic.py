"""A noisy quadratic with a known minimum, which shows the effect of a mode without any model or data.

f(w) = ½·wᵀAw - bᵀw with A = ¼·tridiag(-1, 2, -1) and b = -¼·e₁, so that L = 1; gradients have independent normal
noise in each coordinate. This is the setting of Tyurin and Richtárik (2023) and of Maranjyan et al. (2025).
"""

from __future__ import annotations

import numpy as np

from psgd.simulation.problem import Problem
from psgd_workers.messages import BatchId, EpochGrid, FloatArray

__all__ = ["Quadratic"]

BLOCK = 256  # noise vectors drawn together


class Quadratic:
    """A quadratic function, its noisy gradients, and its minimum.

    Args:
        size: number of parameters.
        noise: standard deviation of the noise in each coordinate of a gradient.
        seed: seed of the noise, which is drawn in the order of the calls.

    Attributes:
        minimum: smallest value of the function.
    """

    def __init__(self, size: int = 100, noise: float = 0.1, seed: int = 0) -> None:
        self._size = size
        self._noise = noise
        self._random = np.random.default_rng(seed)
        self._block = np.empty((0, size), np.float32)
        self._next = 0
        matrix = 0.5 * np.eye(size) - 0.25 * (np.eye(size, k=1) + np.eye(size, k=-1))
        slope = np.zeros(size)
        slope[0] = -0.25
        self.minimum = float(-0.5 * slope @ np.linalg.solve(matrix, slope))
        self._matrix = matrix.astype(np.float32)
        self._slope = slope.astype(np.float32)

    @property
    def start(self) -> FloatArray:
        """Initial point (√size, 0, 0, ...)."""
        start = np.zeros(self._size, np.float32)
        start[0] = np.sqrt(self._size)
        return start

    def excess(self, weights: FloatArray) -> float:
        """Return f(w) minus the minimum of f."""
        return 0.5 * float(weights @ self._matrix @ weights) - float(self._slope @ weights) - self.minimum

    def gradient(self, batch: BatchId, weights: FloatArray, out: FloatArray) -> float:
        """Write A·w - b plus noise into `out`, and return 0 as the loss.

        The loss is not computed, as that would take as long as the gradient.
        """
        del batch
        if self._next == len(self._block):
            self._block = self._random.standard_normal((BLOCK, self._size), np.float32)
            self._block *= self._noise
            self._block -= self._slope
            self._next = 0
        self._matrix.dot(weights, out)
        out += self._block[self._next]
        self._next += 1
        return 0.0

    def problem(self, pushes: int) -> Problem:
        """Return a training problem with one epoch of `pushes` batches."""
        return Problem(EpochGrid((pushes,), pushes), self.start, self.gradient)
