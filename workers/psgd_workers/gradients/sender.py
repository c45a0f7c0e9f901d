"""The sender: cuts a whole gradient into what each partition is sent, and remembers what compression left out."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan, sqrt

import numpy as np

from psgd_workers.gradients.compression import ErrorFeedback, build_compressor
from psgd_workers.messages import BatchId, FloatArray, Gradient, Outcome, Version
from psgd_workers.spec import WorkerOptions

__all__ = ["Sender", "gradient_norm"]

TAKEN = (Outcome.APPLIED, Outcome.BUFFERED)


class Sender:
    """One worker's.

    Args:
        worker: its name.
        parts: each partition's slice of the weights.
        num_trainable: values of the weights before the first buffer.
        rules: what the job wants beyond gradients.
    """

    def __init__(self, worker: str, parts: Sequence[slice], num_trainable: int, worker_options: WorkerOptions) -> None:
        self._worker = worker
        self._parts = parts
        self._sends_weights = worker_options.sends_weights
        compressor = build_compressor(worker_options.compression)
        # How many values of each partition are no buffers.
        self._trained = [max(0, min(int(part.stop), num_trainable) - int(part.start)) for part in parts]
        self._memories = [ErrorFeedback(compressor, size) if compressor and size else None for size in self._trained]
        # One partition, and nothing but the gradient to send: the usual case.
        self._plain = len(parts) == 1 and compressor is None and not worker_options.sends_weights

    @property
    def residual_norm(self) -> float:
        """Euclidean norm of what compression has left out of the pushes so far."""
        return float(np.sqrt(sum(memory.norm**2 for memory in self._memories if memory)))

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
        """What each partition is sent; `settle` must follow, once it is known what became of them.

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
        if self._plain:
            return [Gradient(self._worker, batch, examples, reads[0], values, loss, norm, compute_s)]
        sent = []
        for part, trained, memory, read in zip(self._parts, self._trained, self._memories, reads, strict=True):
            mine = values[part]
            weights_read = weights[part] if self._sends_weights else None
            encoded = memory.encode(mine[:trained]) if memory else mine
            buffers = mine[trained:] if memory and trained < len(mine) else None
            sent.append(
                Gradient(self._worker, batch, examples, read, encoded, loss, norm, compute_s, buffers, weights_read)
            )
        return sent

    def settle(self, outcomes: Sequence[Outcome]) -> None:
        """What became of the gradients sent last, partition by partition; those beyond the last outcome are in doubt.

        What is in doubt counts as refused: what was left out before it is still left out.
        """
        if self._plain:
            return
        for number, memory in enumerate(self._memories):
            if memory is None:
                continue
            if number < len(outcomes) and outcomes[number] in TAKEN:
                memory.taken()
            else:
                memory.refused()


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
