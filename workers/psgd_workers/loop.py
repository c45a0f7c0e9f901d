"""The worker's loop (lease, pull, compute, push) as a state machine: it takes events and returns actions.

The state machine has no clock, socket, thread or array. Its host carries out the actions and reports the events:
`psgd_workers.worker` with a model and lanes, `psgd.simulation.worker` on a virtual clock.

A slot holds one batch from its computation until its push is answered. With a pipeline of p there are p + 1 slots. The
batches of a lease use the slots in rotation, beginning with the first slot. The receipts of a slot's push bring the
weights for the slot's next batch. Meanwhile the worker computes in the other slots, and it waits only for the slot that
is next in rotation. These rules hold:

1. A slot begins a batch only when every partition has answered the slot's last push.
2. A slot that holds no weights pulls them first. At the end of a lease every slot drops its weights.
3. Each batch of a lease is computed once, in order, unless the lease is cancelled or fails.
4. A push is settled once: with every partition's outcome, or, if the lease fails, with the outcomes up to the first
   partition that has not answered. The remaining partitions are in doubt.
5. A lease ends when no batch is being computed and no push is under way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, assert_never

from psgd_workers.messages import BatchId, Outcome, Receipt, Version

__all__ = [
    "Compute",
    "ComputeAborted",
    "Computed",
    "EndLease",
    "LeaseCancelled",
    "LeaseFailed",
    "LeaseGranted",
    "LoopAction",
    "LoopEvent",
    "PipelineSlot",
    "Pull",
    "Pulled",
    "Push",
    "Pushed",
    "ReceiptArrived",
    "Settle",
    "WorkerLoop",
]


# Classes of which every batch creates objects are named tuples: that takes half the time of a dataclass.

# Events ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LeaseGranted:
    """The worker was given a lease, after its previous lease ended."""

    lease: int
    batches: Sequence[BatchId]  # in the order of work


@dataclass(frozen=True, slots=True)
class LeaseCancelled:
    """No more batches may begin in leases up to this one. Batches that have begun continue, so no action follows."""

    lease: int


@dataclass(frozen=True, slots=True)
class Pulled:
    """The weights that `Pull` asked for are in the slot."""

    reads: Sequence[Version]  # versions of the weights, by partition


@dataclass(frozen=True, slots=True)
class Computed:
    """The gradient that `Compute` asked for has been computed."""

    versions: Sequence[Version] = ()  # current versions, by partition; needed if the loop has a `stop_at`


@dataclass(frozen=True, slots=True)
class ComputeAborted:
    """The host aborted the computation under way, because its gradient would be refused."""


@dataclass(frozen=True, slots=True)
class Pushed:
    """The gradient that `Push` asked for has been sent."""


class ReceiptArrived(NamedTuple):
    """A server answered a push. A receipt of a push that is not under way is ignored: it is late, or a duplicate."""

    partition: int
    receipt: Receipt


@dataclass(frozen=True, slots=True)
class LeaseFailed:
    """A server did not answer, or the model raised. The lease is over, and its pushes under way are in doubt."""


LoopEvent = LeaseGranted | LeaseCancelled | Pulled | Computed | ComputeAborted | Pushed | ReceiptArrived | LeaseFailed


# Actions --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pull:
    """Copy the newest weights of every partition into a slot, then report `Pulled`."""

    slot: int


class Compute(NamedTuple):
    """Compute a batch's gradient from the weights in a slot, then report `Computed`."""

    slot: int
    batch: BatchId


class Push(NamedTuple):
    """Send the gradient in a slot to every partition, then report `Pushed`, and each receipt when it arrives."""

    slot: int
    batch: BatchId
    wants: bool  # True: the receipts bring the weights for the slot's next batch


class Settle(NamedTuple):
    """Tell the slot's `Sender` the result of its push."""

    slot: int
    outcomes: Sequence[Outcome]  # by partition; partitions beyond the last outcome are in doubt


@dataclass(frozen=True, slots=True)
class EndLease:
    """Report the end of the lease to the driver."""

    lease: int
    stopped: bool  # True: the lease was cancelled before its last batch


LoopAction = Pull | Compute | Push | Settle | EndLease


# The state machine ----------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class PipelineSlot:
    """The state of one slot, which holds a batch from its computation until its push is answered.

    Attributes:
        number: index of the slot, from 0.
        reads: versions of the weights in the slot, by partition. While a push is under way: the versions that its
            gradient was computed from, replaced by the version in each receipt. Empty while the slot holds no weights.
        batch: batch whose push is under way, or None.
        outcomes: outcomes of that push, by partition; None where a partition has not answered.
        wants: True if the receipts of that push bring the weights for the slot's next batch.
    """

    number: int
    reads: list[Version] = field(default_factory=list)
    batch: BatchId | None = None
    outcomes: list[Outcome | None] = field(default_factory=list)
    wants: bool = False

    def known_outcomes(self) -> list[Outcome]:
        """Return the outcomes up to the first partition that has not answered."""
        known: list[Outcome] = []
        for outcome in self.outcomes:
            if outcome is None:
                break
            known.append(outcome)
        return known


class WorkerLoop:
    """The state machine of one worker: decides its next actions.

    Args:
        partitions: number of partitions; the server of each one answers every push.
        pipeline: number of batches to compute ahead of the oldest push under way.
        stop_at: lowest staleness, in versions, at which a finished gradient is not pushed. None: all gradients are.

    Attributes:
        slots: slots of the pipeline, in the order of the rotation.
        lease: number of the current lease, or None.
        computing: slot that waits for `Pulled` or `Computed`, or None.
    """

    def __init__(self, partitions: int, pipeline: int = 0, stop_at: int | None = None) -> None:
        self.slots = tuple(PipelineSlot(number) for number in range(pipeline + 1))
        self.lease: int | None = None
        self.computing: PipelineSlot | None = None
        self._partitions = partitions
        self._stop_at = stop_at
        self._cancelled = -1  # leases up to this one are cancelled
        self._batches: Sequence[BatchId] = ()
        self._num_begun = 0  # batches of the lease that have begun
        self._pushes: list[PipelineSlot] = []  # slots with a push under way, the oldest push first

    def handle(self, event: LoopEvent) -> tuple[LoopAction, ...]:
        """Process one event.

        Returns:
            Actions that the host carries out now, in this order. If there are none during a lease, the next event is a
            receipt, or the completion of an earlier action.
        """
        match event:
            # A pattern that binds fields takes ten times as long, and each batch passes here at least three times.
            case ReceiptArrived():
                return self._on_receipt(event.partition, event.receipt)
            case Computed():
                return self._on_computed(event.versions)
            case Pushed():
                return self._advance()
            case Pulled():
                return self._on_pulled(event.reads)
            case LeaseGranted():
                return self._on_lease(event.lease, event.batches)
            case ComputeAborted():
                return self._on_aborted()
            case LeaseCancelled():
                self._cancelled = max(self._cancelled, event.lease)
                return ()
            case LeaseFailed():
                return self._on_failed()
            case _:
                assert_never(event)

    def slot_of_push(self, batch: BatchId) -> PipelineSlot | None:
        """Return the slot whose push of `batch` is under way, or None."""
        for slot in self._pushes:
            if slot.batch == batch:
                return slot
        return None

    @property
    def oldest_push(self) -> PipelineSlot | None:
        """Return the slot of the oldest push under way, or None. An idle host waits for its receipts."""
        return self._pushes[0] if self._pushes else None

    def _on_lease(self, lease: int, batches: Sequence[BatchId]) -> tuple[LoopAction, ...]:
        assert self.lease is None, f"lease {lease} was granted before lease {self.lease} ended"
        self.lease = lease
        self._batches = batches
        self._num_begun = 0
        return self._advance()

    def _advance(self) -> tuple[LoopAction, ...]:
        """Begin the next batch if its slot is free, or end the lease if nothing is left, or else wait for receipts."""
        if self.lease is None or self.computing is not None:
            return ()
        if self._num_begun < len(self._batches) and self.lease > self._cancelled:
            slot = self.slots[self._num_begun % len(self.slots)]
            return (self._begin(slot),) if slot.batch is None else ()
        return () if self._pushes else (self._end(self.lease),)

    def _begin(self, slot: PipelineSlot) -> LoopAction:
        self.computing = slot
        self._num_begun += 1
        return Compute(slot.number, self._batches[self._num_begun - 1]) if slot.reads else Pull(slot.number)

    def _on_pulled(self, reads: Sequence[Version]) -> tuple[LoopAction, ...]:
        slot = self.computing
        assert slot is not None, "weights were pulled, but no slot waits for any"
        assert not slot.reads, f"weights were pulled into slot {slot.number}, which holds weights already"
        slot.reads = list(reads)
        return (Compute(slot.number, self._batches[self._num_begun - 1]),)

    def _on_computed(self, versions: Sequence[Version]) -> tuple[LoopAction, ...]:
        slot = self.computing
        assert slot is not None, "a gradient was computed, but no slot waits for one"
        if self._stop_at is not None and _staleness(slot.reads, versions) >= self._stop_at:
            return self._on_aborted()
        self.computing = None
        self._pushes.append(slot)
        slot.batch = batch = self._batches[self._num_begun - 1]
        slot.outcomes = [None] * self._partitions
        slot.wants = self._num_begun - 1 + len(self.slots) < len(self._batches)
        return (Push(slot.number, batch, slot.wants),)

    def _on_aborted(self) -> tuple[LoopAction, ...]:
        slot = self.computing
        assert slot is not None, "no computation is under way"
        self.computing = None
        slot.reads = []
        return self._advance()

    def _on_receipt(self, partition: int, receipt: Receipt) -> tuple[LoopAction, ...]:
        slot = self.slot_of_push(receipt.batch)
        if slot is None or slot.outcomes[partition] is not None:
            return ()
        slot.outcomes[partition] = receipt.outcome
        slot.reads[partition] = receipt.version
        if None in slot.outcomes:
            return ()
        slot.batch = None
        self._pushes.remove(slot)
        if not slot.wants:
            slot.reads = []
        return (Settle(slot.number, slot.known_outcomes()), *self._advance())

    def _on_failed(self) -> tuple[LoopAction, ...]:
        actions = tuple(Settle(slot.number, slot.known_outcomes()) for slot in self._pushes)
        self._clear_lease()
        return actions

    def _end(self, lease: int) -> LoopAction:
        stopped = self._num_begun < len(self._batches)
        self._clear_lease()
        return EndLease(lease, stopped)

    def _clear_lease(self) -> None:
        self.lease = None
        self.computing = None
        self._batches = ()
        self._pushes = []
        for slot in self.slots:
            slot.batch = None
            slot.reads = []


def _staleness(reads: Sequence[Version], versions: Sequence[Version]) -> int:
    """Return the highest staleness of any partition."""
    return max(now.updates - read.updates for now, read in zip(versions, reads, strict=True))
