"""The training problem of a simulated cluster, and the durations of everything but its gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from psgd_workers.messages import BatchId, EpochGrid, Evaluation, FloatArray

__all__ = ["Problem", "Timing"]


@dataclass(frozen=True, slots=True)
class Problem:
    """A training problem: everything that a simulated cluster knows about the model and the data."""

    grid: EpochGrid
    weights: FloatArray  # [num_parameters], initial weights
    gradient: Callable[[BatchId, FloatArray, FloatArray], float]  # (batch, weights, out) -> loss
    num_trainable: int | None = None  # number of values before the first buffer; None: the model has no buffers
    evaluate: Callable[[FloatArray], Evaluation] | None = None  # weights -> result; None: there is no validation data

    @property
    def trainable(self) -> int:
        """Number of values before the first buffer."""
        return len(self.weights) if self.num_trainable is None else self.num_trainable


@dataclass(frozen=True, slots=True)
class Timing:
    """Durations in virtual seconds."""

    call_s: float = 0.001  # a message between the driver and a worker or server
    link_s: float = 0.0  # transfer of a gradient to the server; the same again for the weights on their way back
    start_s: float = 1.0  # start of a process
    poll_s: float = 0.2  # longest time that a server delays the report that the driver polls for
    death_s: float = 0.05  # from the death of a worker or server until the driver is informed
    evaluate_s: float = 0.1  # an evaluation on the validation data
    restore_s: float = 0.5  # restoring a lost server
    interrupts: bool = False  # with `stop: true`, a computation is stopped as soon as it is too stale, not at its end
