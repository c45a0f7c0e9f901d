"""What is simulated: a problem that workers compute gradients of, and how long everything else takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from psgd_workers.messages import BatchId, EpochGrid, Evaluation, FloatArray

__all__ = ["Problem", "Timing"]


def _one_example(batch: BatchId) -> int:
    del batch
    return 1


@dataclass(frozen=True, slots=True)
class Problem:
    """What is trained: everything a cluster has to know about model and data."""

    grid: EpochGrid
    weights: FloatArray  # [num_parameters], initial
    gradient: Callable[[BatchId, FloatArray, FloatArray], float]  # (batch, weights, out) -> loss
    num_trainable: int | None = None  # values before the first buffer; None: all
    examples: Callable[[BatchId], int] = _one_example
    evaluate: Callable[[FloatArray], Evaluation] | None = None  # None: there is nothing to validate on

    @property
    def trainable(self) -> int:
        """Values before the first buffer."""
        return len(self.weights) if self.num_trainable is None else self.num_trainable


@dataclass(frozen=True, slots=True)
class Timing:
    """How long things take, in virtual seconds."""

    call_s: float = 0.001  # every message between the driver and an actor
    link_s: float = 0.0  # a gradient to its server, and the weights back
    start_s: float = 1.0  # a process
    poll_s: float = 0.2  # until a waiting report is given at the latest
    death_s: float = 0.05  # until the driver hears of a death
    evaluate_s: float = 0.1
    restore_s: float = 0.5  # a lost server
