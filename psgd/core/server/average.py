"""Average: an exponential moving average of the weights, which is what a job that keeps one evaluates."""

from __future__ import annotations

import numpy as np

from psgd.core.server.optimizers import in_blocks
from psgd_workers.messages import FloatArray

__all__ = ["Average"]


class Average:
    """avg ← d·avg + (1 - d)·w, with d = min(decay, (1 + k) / (10 + k)) at the k-th step: the start is forgotten.

    Args:
        decay: in (0, 1). Higher: more steps are averaged.
        weights: `[size]` float32, where it begins; copied.

    Attributes:
        values: `[size]` float32, the average.

    As TensorFlow's with `num_updates`: https://www.tensorflow.org/api_docs/python/tf/train/ExponentialMovingAverage
    """

    def __init__(self, decay: float, weights: FloatArray) -> None:
        self._decay = decay
        self._blocks = in_blocks(len(weights))
        self.values = weights.copy()

    def take(self, weights: FloatArray, steps: int) -> None:
        """Average the weights in as they are after so many steps."""
        decay = min(self._decay, (1 + steps) / (10 + steps))
        for part, scratch, _ in self._blocks:
            averaged = self.values[part]
            np.subtract(weights[part], averaged, out=scratch)
            scratch *= 1 - decay
            averaged += scratch
