"""The sender: cuts a whole gradient into what each partition is sent, and remembers what compression left out."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan, sqrt

import numpy as np

from psgd_workers.gradients.compression import ErrorFeedback, build_compressor
from psgd_workers.messages import BatchId, FloatArray, Gradient, Outcome, Version
from psgd_workers.spec import WorkerOptions

__all__ = ["TAKEN", "PartSender", "Sender", "gradient_norm"]

TAKEN = (Outcome.APPLIED, Outcome.BUFFERED)


class PartSender:
    """Cuts one slot's gradients for one partition, and remembers what compression left out of them.

    Args:
        partition: its number.
        part: its slice of the weights.
        num_trainable: values of the weights before the first buffer.
        rules: what the job wants beyond gradients.

    Attributes:
        number: of the newest push; 0 before the first.
        carries: number of the newest push that is known to be taken, if gradients are compressed: what was left out of
            it goes into the next. 0: there is none.
    """

    def __init__(self, partition: int, part: slice, num_trainable: int, worker_options: WorkerOptions) -> None:
        self.number = 0
        self.carries = 0
        self._partition = partition
        self._part = part
        self._sends_weights = worker_options.sends_weights
        self._trained = max(0, min(int(part.stop), num_trainable) - int(part.start))  # values that are no buffers
        compressor = build_compressor(worker_options.compression)
        self._memory = ErrorFeedback(compressor, self._trained) if compressor and self._trained else None

    @property
    def residual_norm(self) -> float:
        """Euclidean norm of what compression has left out of the pushes so far."""
        return self._memory.norm if self._memory else 0.0

    def cut(self, whole: Gradient, values: FloatArray, weights: FloatArray, reads: Sequence[Version]) -> Gradient:
        """Return what the partition is sent; `settle` must follow, once it is known what became of it.

        Args:
            whole: facts about the whole gradient.
            values: `[num_parameters]`, the gradient.
            weights: `[num_parameters]`, what it was computed from.
            reads: the version of each partition that it was computed from.
        """
        mine = values[self._part]
        place = self._partition
        trained = self._trained
        memory = self._memory
        self.number = whole.number
        return whole._replace(
            read=reads[place],
            values=memory.encode(mine[:trained]) if memory else mine,
            buffers=mine[trained:] if memory and trained < len(mine) else None,
            weights_read=weights[self._part] if self._sends_weights else None,
            others=(*reads[:place], *reads[place + 1 :]),
            carries=self.carries,
        )

    def settle(self, taken: bool) -> None:
        """Keep what the newest push left out if it was taken; otherwise what was left out before it is still left out.

        Args:
            taken: false also while that is in doubt.
        """
        if self._memory is None:
            return
        if taken:
            self._memory.taken()
            self.carries = self.number
        else:
            self._memory.refused()


class Sender:
    """Cuts the gradients of one slot of a worker's pipeline for every partition.

    Args:
        worker: its name.
        slot: its number.
        parts: each partition's slice of the weights.
        num_trainable: values of the weights before the first buffer.
        rules: what the job wants beyond gradients.
    """

    def __init__(
        self, worker: str, slot: int, parts: Sequence[slice], num_trainable: int, worker_options: WorkerOptions
    ) -> None:
        self._worker = worker
        self._slot = slot
        self._number = 0  # of the newest push
        self._parts = [PartSender(number, part, num_trainable, worker_options) for number, part in enumerate(parts)]
        # One partition, and nothing but the gradient to send: the usual case.
        self._plain = (
            len(parts) == 1
            and build_compressor(worker_options.compression) is None
            and not worker_options.sends_weights
        )

    @property
    def residual_norm(self) -> float:
        """Euclidean norm of what compression has left out of the pushes so far."""
        return sqrt(sum(part.residual_norm**2 for part in self._parts))

    def gradients(
        self,
        batch: BatchId,
        examples: int,
        reads: Sequence[Version],
        values: FloatArray,
        weights: FloatArray,
        loss: float,
        norm: float,
        compute_s: float,
    ) -> list[Gradient]:
        """Return what each partition is sent; `settle` must follow, once it is known what became of them.

        Args:
            batch: what the gradient was computed of.
            examples: how many those are.
            reads: the version of each partition that it was computed from.
            values: `[num_parameters]`, the gradient; the messages hold views of it.
            weights: `[num_parameters]`, what it was computed from; likewise, if the job's correction asks for them.
            loss: mean over the examples.
            norm: `gradient_norm` of it.
            compute_s: seconds spent on it.
        """
        self._number += 1
        whole = Gradient(
            self._worker, self._slot, self._number, batch, examples, reads[0], values, loss, norm, compute_s
        )
        return [whole] if self._plain else [part.cut(whole, values, weights, reads) for part in self._parts]

    def settle(self, outcomes: Sequence[Outcome]) -> None:
        """Note what became of the gradients sent last, by partition; those beyond the last outcome are in doubt.

        What is in doubt counts as refused: what was left out before it is still left out.
        """
        if self._plain:
            return
        for number, part in enumerate(self._parts):
            part.settle(number < len(outcomes) and outcomes[number] in TAKEN)


def gradient_norm(values: FloatArray, num_trainable: int) -> float:
    """Euclidean norm of the trained part; inf if that is too long for float32, nan if anything is not finite.

    Overflow is an answer here: the caller keeps NumPy from warning of it.
    """
    if num_trainable == len(values):
        return sqrt(np.dot(values, values))
    trained = values[:num_trainable]
    buffers = values[num_trainable:]
    # A buffer that is not finite is refused like a gradient.
    return sqrt(np.dot(trained, trained)) if np.isfinite(buffers).all() else nan
