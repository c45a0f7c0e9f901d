"""Gradients for aggregators: random values, by the number of their batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from psgd.core.server.aggregators import Aggregator, Contribution, Step, StepMember
from psgd_workers.messages import BatchId, FloatArray

__all__ = ["SIZE", "TRAINABLE", "Float64", "randoms", "scaled", "step_on", "taken"]

SIZE = 6
TRAINABLE = 4  # two buffers follow

Float64 = NDArray[np.float64]


def randoms(*seed: int) -> FloatArray:
    """Return random values of trained values and buffers."""
    return np.random.default_rng(seed).standard_normal(SIZE, dtype=np.float32)


def taken(
    number: int, worker: str = "a", *, examples: int = 1, read: int = 0, scale: float = 1.0, weight: float = 1.0
) -> Contribution:
    """Return the random gradient of batch `number`."""
    return Contribution(worker, BatchId(0, 0, number), StepMember(read, examples), randoms(number), scale, weight)


def scaled(number: int, scale: float) -> Float64:
    """Return the gradient of batch `number` with its trained values scaled, and its buffers unchanged."""
    factors: Float64 = np.array([scale] * TRAINABLE + [1.0] * (SIZE - TRAINABLE))
    return randoms(number) * factors


def step_on(aggregator: Aggregator, gradients: Sequence[Contribution]) -> Step:
    """Return the step on a round of these gradients."""
    for gradient in gradients:
        aggregator.add(gradient)
    return aggregator.close()
