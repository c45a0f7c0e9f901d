"""The problem that simulated workers compute gradients of, and the time that everything else takes."""

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
    """A training problem: everything that a simulated cluster must know about model and data."""

    grid: EpochGrid
    weights: FloatArray  # [num_parameters], initial weights
    gradient: Callable[[BatchId, FloatArray, FloatArray], float]  # (batch, weights, out) -> loss
    num_trainable: int | None = None  # values before the first buffer; None: all
    examples: Callable[[BatchId], int] = _one_example  # number of examples in a batch
    evaluate: Callable[[FloatArray], Evaluation] | None = None  # None: no validation part

    @property
    def trainable(self) -> int:
        """Return the number of values before the first buffer."""
        return len(self.weights) if self.num_trainable is None else self.num_trainable


@dataclass(frozen=True, slots=True)
class Timing:
    """Durations in virtual seconds."""

    call_s: float = 0.001  # a message between the driver and an actor
    link_s: float = 0.0  # a gradient on its way to the server, and the weights on their way back
    start_s: float = 1.0  # start of a process
    poll_s: float = 0.2  # longest time that a server holds a report back
    death_s: float = 0.05  # from a death until the driver hears of it
    evaluate_s: float = 0.1  # an evaluation
    restore_s: float = 0.5  # restoring a lost server
    interrupts: bool = False  # with `stop: true` a stale computation is given up at once, not when it is done
