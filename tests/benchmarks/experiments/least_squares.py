"""A random least-squares problem, whose minimum is known."""

from __future__ import annotations

import numpy as np

from psgd.simulation.problem import Problem
from psgd_workers.messages import BatchId, EpochGrid, FloatArray

__all__ = ["LeastSquares"]

EXAMPLES = 2000
SIZE = 100
BATCH = 64
NOISE = 0.1  # standard deviation of the noise in b


class LeastSquares:
    """F(x) = |Ax - b|² / 2m, with A from U[0, 1] / √d and b = Ax₀ + noise, x₀ from U[-1, 1].

    Args:
        seed: seed of A, b and the batches; batches are drawn in the order of the calls.

    Attributes:
        smoothness: L, the largest eigenvalue of AᵀA / m.
    """

    def __init__(self, seed: int) -> None:
        self._random = random = np.random.default_rng(seed)
        matrix = random.random((EXAMPLES, SIZE)) / np.sqrt(SIZE)
        values = matrix @ random.uniform(-1, 1, SIZE) + NOISE * random.standard_normal(EXAMPLES)
        self._hessian = matrix.T @ matrix / EXAMPLES
        self._best = np.linalg.solve(self._hessian, matrix.T @ values / EXAMPLES)
        self.smoothness = float(np.linalg.eigvalsh(self._hessian)[-1])
        self._matrix = matrix.astype(np.float32)
        self._values = values.astype(np.float32)

    def excess(self, weights: FloatArray) -> float:
        """Return F minus its minimum."""
        gap = weights - self._best
        return 0.5 * float(gap @ self._hessian @ gap)

    def gradient(self, batch: BatchId, weights: FloatArray, out: FloatArray) -> float:
        """Write the gradient of the mean over `BATCH` rows, drawn with replacement. The loss is not used and is 0."""
        rows = self._random.integers(EXAMPLES, size=BATCH)
        matrix = self._matrix[rows]
        np.dot(matrix @ weights - self._values[rows], matrix, out=out)
        out /= BATCH
        return 0.0

    def problem(self, batches: int) -> Problem:
        """Return the problem with zeros as initial weights, in one epoch of `batches` batches."""
        return Problem(EpochGrid((batches,), batches), np.zeros(SIZE, np.float32), self.gradient)
