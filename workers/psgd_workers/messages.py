"""What workers, servers and the driver say to each other: frozen, slotted values without behaviour.

A batch is named for ever by its `BatchId`. Within one epoch the batches also have an order, shard by shard; a batch's
place in it is its *position*, and `EpochGrid` translates between the two. Leases and applied sets speak in positions,
because ranges and bitmaps of them are small.
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
    """The name of the data of one push."""

    epoch: int  # from 0
    shard: int  # from 0
    index: int  # type: ignore[assignment]  # of the batch in its shard, from 0; nobody looks for tuple.index here


class Version(NamedTuple):
    """How far one server has come: steps taken, counted on across its restarts."""

    incarnation: int  # raised by one whenever a server is started or restored
    updates: int  # optimizer steps in the weights


class Outcome(Enum):
    """What became of a push."""

    APPLIED = "applied"  # its gradient is in the weights
    BUFFERED = "buffered"  # it is in the state, and will be in the weights with the next step
    DUPLICATE = "duplicate"  # this partition's state already contains the batch
    REQUEUED = "requeued"  # refused: the batch goes back to the ledger and is computed again
    DISCARDED = "discarded"  # dropped for good, where the spec allows that
    REJECTED = "rejected"  # not finite

    __hash__ = object.__hash__  # members are unique; Enum's own hash of the name is slower, and every push counts some


@dataclass(frozen=True, slots=True)
class EpochGrid:
    """The shape of every epoch: how many batches each shard has, and how many examples there are.

    Positions number an epoch's batches in `BatchId` order, from 0 to `num_batches - 1`.
    """

    batches_per_shard: tuple[int, ...]
    num_examples: int
    _ends: tuple[int, ...] = field(init=False, repr=False, compare=False)  # of each shard, in positions
    _starts: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ends = tuple(accumulate(self.batches_per_shard))
        object.__setattr__(self, "_ends", ends)
        object.__setattr__(self, "_starts", (0, *ends[:-1]))

    @property
    def num_batches(self) -> int:
        return self._ends[-1]

    def shard_start(self, shard: int) -> int:
        """The position of a shard's first batch."""
        return self._starts[shard]

    def position(self, batch: BatchId) -> int:
        return self._starts[batch.shard] + batch.index

    def batch(self, epoch: int, position: int) -> BatchId:
        if not 0 <= position < self.num_batches:
            raise IndexError(f"position {position} is outside an epoch of {self.num_batches} batches")
        shard = bisect_right(self._ends, position)
        return BatchId(epoch, shard, position - self._starts[shard])


class BatchRange(NamedTuple):
    """Positions `start, start + step, ...` below `stop`, of one epoch."""

    epoch: int
    start: int
    stop: int
    step: int = 1

    def positions(self) -> range:
        return range(self.start, self.stop, self.step)


@dataclass(frozen=True, slots=True)
class Lease:
    """Batches given to one worker: one actor call, closed by its return or its error."""

    id: int
    batches: tuple[BatchRange, ...]

    def __len__(self) -> int:
        return sum(len(r.positions()) for r in self.batches)

    def positions(self) -> Iterator[tuple[int, int]]:
        """(epoch, position) of each batch, in the order of work."""
        for batches in self.batches:
            for position in batches.positions():
                yield batches.epoch, position


@dataclass(frozen=True, slots=True)
class LeaseEnd:
    """A lease's return. It says nothing about what was applied: only the servers know that."""

    lease: int
    stopped: bool  # the worker was asked to stop before the lease's end
    residual_norm: float = 0.0  # of what compression has left out of its pushes so far


@dataclass(frozen=True, slots=True)
class Encoded:
    """What travels instead of a float32 slice; see `psgd_workers.gradients.compression`."""

    kind: str  # the compressor's name in the spec
    size: int  # length of the decoded vector
    arrays: tuple[NDArray[Any], ...]  # as the compressor of this kind lists them

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


class Gradient(NamedTuple):
    """One push: the gradient of one batch's mean loss, cut to one partition, and facts about the whole of it.

    Worker, slot and number name a push: they are the same for every partition, and unique in one process of a run.
    An encoded gradient holds the trained values; the partition's buffers, which are exact or nothing, travel beside it.
    """

    worker: str
    slot: int  # of the worker's pipeline, from 0
    number: int  # counts the pushes of that slot, from 1
    batch: BatchId
    examples: int
    read: Version  # the version of this partition that the gradient was computed from
    values: FloatArray | Encoded  # [partition size], encoded: [its trained values]
    loss: float  # mean over the batch's examples
    norm: float  # Euclidean, of the whole gradient over all partitions; inf or nan if it is not finite
    compute_s: float  # seconds spent backpropagating
    buffers: FloatArray | None = None  # of an encoded gradient: the partition's change of buffers
    weights_read: FloatArray | None = None  # [partition size], if the job's correction asks for it
    others: tuple[Version, ...] = ()  # versions of the other partitions that it was computed from, in their order
    carries: int = 0  # number of the push whose remainder, left out by compression, is in the values; 0: of none

    @property
    def nbytes(self) -> int:
        """Of its vectors."""
        size = self.values.nbytes
        if self.buffers is not None:
            size += self.buffers.nbytes
        return size if self.weights_read is None else size + self.weights_read.nbytes


class Receipt(NamedTuple):
    """The answer to a push. Holding one, a worker may start its next batch."""

    worker: str
    batch: BatchId
    outcome: Outcome
    version: Version  # the partition's version now


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one copy of the weights does on the validation examples."""

    loss: float  # mean over the examples
    accuracy: float | None  # share of examples classified rightly; None for a regression
    examples: int
