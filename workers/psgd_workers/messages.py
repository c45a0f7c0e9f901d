"""Messages between workers, servers and the driver: immutable values.

A `BatchId` names one batch of the whole run. Within one epoch the batches are also numbered from 0, shard by shard: the
number of a batch is its *position*, and `EpochGrid` translates between the two. Leases and applied sets use positions,
because ranges and bitmaps of positions are small.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from psgd_workers.counting import counted

__all__ = [
    "BatchId",
    "BatchRange",
    "Encoded",
    "EpochGrid",
    "Evaluation",
    "FloatArray",
    "Gradient",
    "Lease",
    "LeaseEnd",
    "Outcome",
    "Receipt",
    "Version",
]

FloatArray = NDArray[np.float32]


class BatchId(NamedTuple):
    """The identity of a batch, the data of one push."""

    epoch: int  # from 0
    shard: int  # from 0
    index: int  # type: ignore[assignment]  # in its shard, from 0; hides tuple.index

    @property
    def text(self) -> str:
        """Return the batch's name for people. Epochs are counted from 1, as in all output; the other numbers from 0."""
        return f"batch {self.index} of shard {self.shard} in epoch {self.epoch + 1}"


class Version(NamedTuple):
    """The version of one server's partition. Later versions compare greater."""

    incarnation: int  # number of this start or restoration, counted over the whole run; a later one has a higher number
    updates: int  # optimizer steps contained in the weights; continues to count after a restart


class Outcome(Enum):
    """A server's decision about a push."""

    APPLIED = "applied"  # the gradient is in the weights
    BUFFERED = "buffered"  # the gradient is in the state, and enters the weights with the next step
    DUPLICATE = "duplicate"  # refused: this partition's state already contains the batch
    REQUEUED = "requeued"  # refused: the batch goes back to the ledger and is computed again
    DISCARDED = "discarded"  # dropped for good, because the job allows it
    REJECTED = "rejected"  # refused: the gradient is not finite

    __hash__ = object.__hash__  # members are singletons. Enum's own hash is slower, and each push is counted by outcome


@dataclass(frozen=True, slots=True)
class EpochGrid:
    """The number of batches in each shard and of examples in an epoch; the same for every epoch.

    Positions number the batches of an epoch in `BatchId` order, from 0 to `num_batches - 1`. In a shard, each batch but
    the last has `batch_size` examples. Without `examples_per_shard`, all batches are equally large.
    """

    batches_per_shard: tuple[int, ...]
    num_examples: int
    batch_size: int = 0
    examples_per_shard: tuple[int, ...] = ()
    _ends: tuple[int, ...] = field(init=False, repr=False, compare=False)  # by shard, the position after its last batch
    _starts: tuple[int, ...] = field(init=False, repr=False, compare=False)  # by shard, the position of its first batch

    def __post_init__(self) -> None:
        ends = tuple(accumulate(self.batches_per_shard))
        object.__setattr__(self, "_ends", ends)
        object.__setattr__(self, "_starts", (0, *ends[:-1]))

    @property
    def num_batches(self) -> int:
        """Return the number of batches in an epoch."""
        return self._ends[-1]

    def shard_start(self, shard: int) -> int:
        """Return the position of a shard's first batch."""
        return self._starts[shard]

    def examples(self, batch: BatchId) -> int:
        """Return the number of examples in a batch."""
        if not self.examples_per_shard:
            return self.num_examples // self.num_batches
        return min(self.batch_size, self.examples_per_shard[batch.shard] - batch.index * self.batch_size)

    def position(self, batch: BatchId) -> int:
        """Return the position of a batch in its epoch."""
        return self._starts[batch.shard] + batch.index

    def batch(self, epoch: int, position: int) -> BatchId:
        """Return the batch at a position of an epoch: the inverse of `position`."""
        if not 0 <= position < self.num_batches:
            raise IndexError(
                f"position {position} is outside an epoch of {counted(self.num_batches, 'batch', 'batches')}"
            )
        shard = bisect_right(self._ends, position)
        return BatchId(epoch, shard, position - self._starts[shard])


class BatchRange(NamedTuple):
    """The batches at the positions `start, start + step, ...` below `stop` of one epoch."""

    epoch: int
    start: int
    stop: int
    step: int = 1

    def positions(self) -> range:
        """Return the positions of the batches."""
        return range(self.start, self.stop, self.step)


@dataclass(frozen=True, slots=True)
class Lease:
    """Batches given to one worker in one actor call. The lease ends when that call returns or fails."""

    id: int
    batches: tuple[BatchRange, ...]

    def __len__(self) -> int:
        return sum(len(batches.positions()) for batches in self.batches)

    def positions(self) -> Iterator[tuple[int, int]]:
        """Yield (epoch, position) of each batch, in the order of work."""
        for batches in self.batches:
            for position in batches.positions():
                yield batches.epoch, position


@dataclass(frozen=True, slots=True)
class LeaseEnd:
    """The return value of a lease. It does not say which batches were applied: only the servers know that."""

    lease: int
    stopped: bool  # the lease was cancelled before its last batch
    residual_norm: float = 0.0  # Euclidean norm of the part of the gradients that compression has not sent yet


@dataclass(frozen=True, slots=True)
class Encoded:
    """A compressed vector, sent instead of float32 values. See `psgd_workers.gradients.compression`."""

    kind: str  # name of the compressor in the spec
    size: int  # length of the decoded vector
    arrays: tuple[NDArray[Any], ...]  # their meaning depends on the compressor

    @property
    def nbytes(self) -> int:
        """Return the size of the arrays in bytes."""
        return sum(array.nbytes for array in self.arrays)


class Gradient(NamedTuple):
    """One push: the gradient of one batch's mean loss, cut to one partition, and metadata of the whole gradient.

    `worker`, `slot` and `number` identify a push: they are the same in every partition, and differ from those of every
    other push of that worker process. An encoded gradient holds the values of trained tensors only. The gradient of
    buffers is never compressed, and is sent in `buffers`.
    """

    worker: str
    slot: int  # slot of the worker's pipeline, from 0
    number: int  # counts the pushes of that slot, from 1
    batch: BatchId
    examples: int  # number of examples in the batch
    read: Version  # version of this partition that the gradient was computed from
    values: FloatArray | Encoded  # [partition size]; if encoded, [number of trained values in the partition]
    loss: float  # mean loss over the batch's examples
    norm: float  # Euclidean norm of the trained tensors over all partitions; inf or nan if any value is not finite
    compute_s: float  # seconds spent backpropagating
    buffers: FloatArray | None = None  # with an encoded gradient: gradient of the partition's buffers
    weights_read: FloatArray | None = None  # [partition size]; sent if the job's correction needs it
    others: tuple[Version, ...] = ()  # versions read of the other partitions, in partition order
    carries: int = 0  # number of the push whose compression remainder is added to the values; 0: none

    @property
    def nbytes(self) -> int:
        """Return the size of the vectors in bytes."""
        size = self.values.nbytes
        if self.buffers is not None:
            size += self.buffers.nbytes
        return size if self.weights_read is None else size + self.weights_read.nbytes


class Receipt(NamedTuple):
    """The answer to a push. With it a worker may start its next batch."""

    worker: str
    batch: BatchId
    outcome: Outcome
    version: Version  # version of the partition after this push


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Loss and accuracy of one copy of the weights on the validation examples."""

    loss: float  # mean over the examples
    accuracy: float | None  # share of examples classified correctly; None for a regression
    examples: int  # number of examples
