"""The sender: it cuts a gradient into one push for each partition, and keeps the errors of their compression."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan, sqrt

import numpy as np

from psgd_workers.gradients.compression import ErrorFeedback, build_compressor
from psgd_workers.messages import BatchId, FloatArray, Gradient, Outcome, Version
from psgd_workers.spec import WorkerOptions

__all__ = ["TAKEN", "PartSender", "Sender", "gradient_norm"]

TAKEN = (Outcome.APPLIED, Outcome.BUFFERED)  # outcomes of pushes that the server's state contains


class PartSender:
    """Makes the pushes of one slot to one partition, and keeps the errors of their compression.

    Args:
        partition: number of the partition.
        part: slice of the weights that the partition holds.
        num_trainable: values of the weights before the first buffer.
        worker_options: compression, and whether pushes carry the weights.

    Attributes:
        number: number of the newest push; 0 before the first.
        carries: number of the newest push that the server is known to have taken and whose compression error the next
            push carries; 0: there is none, or gradients are not compressed.
    """

    def __init__(self, partition: int, part: slice, num_trainable: int, worker_options: WorkerOptions) -> None:
        self.number = 0
        self.carries = 0
        self._partition = partition
        self._part = part
        self._sends_weights = worker_options.sends_weights
        # Values of the part that are no buffers.
        self._trained = max(0, min(int(part.stop), num_trainable) - int(part.start))
        compressor = build_compressor(worker_options.compression)
        self._memory = ErrorFeedback(compressor, self._trained) if compressor and self._trained else None

    @property
    def residual_norm(self) -> float:
        """Return the Euclidean norm of the compression errors that no push has carried yet."""
        return self._memory.norm if self._memory else 0.0

    def cut(self, whole: Gradient, values: FloatArray, weights: FloatArray, reads: Sequence[Version]) -> Gradient:
        """Return the push to the partition. `settle` must follow before the next one.

        Args:
            whole: push of the whole gradient, from which all scalar fields are taken.
            values: gradient `[num_parameters]`, float32.
            weights: weights `[num_parameters]`, float32, that the gradient was computed from.
            reads: version of each partition that the gradient was computed from.
        """
        part_values = values[self._part]
        partition = self._partition
        trained = self._trained
        memory = self._memory
        self.number = whole.number
        return whole._replace(
            read=reads[partition],
            values=memory.encode(part_values[:trained]) if memory else part_values,
            buffers=part_values[trained:] if memory and trained < len(part_values) else None,
            weights_read=weights[self._part] if self._sends_weights else None,
            others=(*reads[:partition], *reads[partition + 1 :]),
            carries=self.carries,
        )

    def settle(self, taken: bool) -> None:
        """Keep the compression error of the newest push if the server took it; otherwise keep the error from before.

        Args:
            taken: True if the server's state contains the push; False if it does not, or if that is in doubt.
        """
        if self._memory is None:
            return
        if taken:
            self._memory.taken()
            self.carries = self.number
        else:
            self._memory.refused()


class Sender:
    """Makes the pushes of one slot of a worker's pipeline, one for each partition.

    Args:
        worker: name of the worker.
        slot: number of the slot.
        parts: slice of the weights that each partition holds.
        num_trainable: values of the weights before the first buffer.
        worker_options: compression, and whether pushes carry the weights.
    """

    def __init__(
        self, worker: str, slot: int, parts: Sequence[slice], num_trainable: int, worker_options: WorkerOptions
    ) -> None:
        self._worker = worker
        self._slot = slot
        self._number = 0  # number of the newest push
        self._parts = [PartSender(number, part, num_trainable, worker_options) for number, part in enumerate(parts)]
        # The usual case: one partition, and a push that carries nothing but the gradient.
        self._plain = (
            len(parts) == 1
            and build_compressor(worker_options.compression) is None
            and not worker_options.sends_weights
        )

    @property
    def residual_norm(self) -> float:
        """Return the Euclidean norm of the compression errors that no push has carried yet."""
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
        """Return the pushes of one gradient, by partition. `settle` must follow before the next one.

        Args:
            batch: batch of which the gradient was computed.
            examples: number of examples of the batch.
            reads: version of each partition that the gradient was computed from.
            values: gradient `[num_parameters]`, float32. The pushes hold views of it.
            weights: weights `[num_parameters]`, float32, that the gradient was computed from. The pushes hold views of
                them if the job's correction needs the weights.
            loss: mean loss over the examples.
            norm: norm of the gradient, from `gradient_norm`.
            compute_s: seconds that computing the gradient took.
        """
        self._number += 1
        whole = Gradient(
            self._worker, self._slot, self._number, batch, examples, reads[0], values, loss, norm, compute_s
        )
        return [whole] if self._plain else [part.cut(whole, values, weights, reads) for part in self._parts]

    def settle(self, outcomes: Sequence[Outcome]) -> None:
        """Note the outcomes of the newest pushes.

        Args:
            outcomes: outcomes by partition. Pushes to partitions beyond the last outcome are in doubt, and treated as
                refused: the compression error from before them is kept.
        """
        if self._plain:
            return
        for number, part in enumerate(self._parts):
            part.settle(number < len(outcomes) and outcomes[number] in TAKEN)


def gradient_norm(values: FloatArray, num_trainable: int) -> float:
    """Return the Euclidean norm of the trained values; inf or nan if it overflows float32 or a value is not finite.

    An overflow is no error here: the caller silences NumPy's warning.

    Args:
        values: gradient `[num_parameters]`, float32, with buffers last.
        num_trainable: values before the first buffer.
    """
    if num_trainable == len(values):
        return sqrt(values.dot(values))
    trained = values[:num_trainable]
    buffers = values[num_trainable:]
    # A buffer that is not finite is refused like a gradient.
    return sqrt(trained.dot(trained)) if np.isfinite(buffers).all() else nan
