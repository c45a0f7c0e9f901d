"""An exponential moving average of the weights. A job that keeps one evaluates it in place of the weights."""

from __future__ import annotations

import numpy as np

from psgd.core.server.optimizers import in_blocks
from psgd_workers.messages import FloatArray

__all__ = ["Average"]


class Average:
    """Exponential moving average of the weights w.

    avg ← d·avg + (1 - d)·w, with d = min(decay, (1 + k) / (10 + k)) at step k, so that early weights fade quickly.

    Args:
        decay: factor in (0, 1). Higher → more steps are averaged.
        weights: `[size]` float32, initial value of the average; copied.

    Attributes:
        values: `[size]` float32, the average.

    References:
        The same rule as TensorFlow's with `num_updates`:
        https://www.tensorflow.org/api_docs/python/tf/train/ExponentialMovingAverage
    """

    def __init__(self, decay: float, weights: FloatArray) -> None:
        self._decay = decay
        self._blocks = in_blocks(len(weights))
        self.values = weights.copy()

    def update(self, weights: FloatArray, steps: int) -> None:
        """Update the average with the weights `[size]` after `steps` optimizer steps."""
        decay = min(self._decay, (1 + steps) / (10 + steps))
        for part, scratch, _ in self._blocks:
            averaged = self.values[part]
            np.subtract(weights[part], averaged, out=scratch)
            scratch *= 1 - decay
            averaged += scratch
