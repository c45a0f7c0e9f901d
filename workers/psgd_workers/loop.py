"""The worker's loop as a state machine: lease, pull, compute, push. Events in, actions out.

It has no clock, no socket, no thread and no array. `psgd_workers.worker` hosts it with a model and lanes, and
`psgd.simulation.worker` on a virtual clock.

With a pipeline of p there are p + 1 slots. The batches of a lease use them in rotation, beginning with the first slot.
The receipts of a slot's push bring the weights for the slot's next batch. Meanwhile the worker computes in the other
slots, and it waits only for the slot whose turn it is. These rules hold:

1. A slot begins a batch only when every partition has answered the slot's last push.
2. A slot that holds no weights pulls them first. Weights do not outlive a lease.
3. Each batch of a lease is computed once, in order, unless the lease is cancelled or fails.
4. A push is settled once: with every partition's outcome, or, if the lease fails, with the outcomes up to the first
   partition that has not answered. The rest is in doubt.
5. A lease ends when nothing is computed and no push is under way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, assert_never

from psgd_workers.messages import BatchId, Outcome, Receipt, Version

__all__ = [
    "CalledOff",
    "Cancelled",
    "Compute",
    "Computed",
    "EndLease",
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


# What every batch needs is a named tuple, which is made in half the time of a dataclass.

# Events ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LeaseGranted:
    """The worker has a lease to work through; the one before has ended."""

    lease: int
    batches: Sequence[BatchId]  # in the order of work


@dataclass(frozen=True, slots=True)
class Cancelled:
    """No more batches are to begin in leases up to this one. What has begun goes on, so no action follows at once."""

    lease: int


@dataclass(frozen=True, slots=True)
class Pulled:
    """The weights that `Pull` asked for lie in the slot."""

    reads: Sequence[Version]  # of the weights, by partition


@dataclass(frozen=True, slots=True)
class Computed:
    """The gradient that `Compute` asked for is done."""

    versions: Sequence[Version] = ()  # of the servers now, by partition; for a loop with a `stop_at`


@dataclass(frozen=True, slots=True)
class CalledOff:
    """The computation under way is given up; its gradient would be refused."""


@dataclass(frozen=True, slots=True)
class Pushed:
    """The gradient that `Push` asked for was sent."""


class ReceiptArrived(NamedTuple):
    """A server answered a push. The answer to a push that is not under way is ignored: it was late, or came twice."""

    partition: int
    receipt: Receipt


@dataclass(frozen=True, slots=True)
class LeaseFailed:
    """A server did not answer, or the model raised: the lease is over, and its pushes under way are in doubt."""


LoopEvent = LeaseGranted | Cancelled | Pulled | Computed | CalledOff | Pushed | ReceiptArrived | LeaseFailed


# Actions --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pull:
    """Get the newest weights of every partition into a slot, then report `Pulled`."""

    slot: int


class Compute(NamedTuple):
    """Compute a batch's gradient from the weights in a slot, then report `Computed`."""

    slot: int
    batch: BatchId


class Push(NamedTuple):
    """Send the gradient in a slot to every partition, then report `Pushed`, and each receipt as it comes."""

    slot: int
    batch: BatchId
    wants: bool  # the receipts are to bring the weights for the slot's next batch


class Settle(NamedTuple):
    """Tell the slot's `Sender` the result of its push."""

    slot: int
    outcomes: Sequence[Outcome]  # by partition; partitions beyond the last outcome are in doubt


@dataclass(frozen=True, slots=True)
class EndLease:
    """Report the end of the lease to the driver."""

    lease: int
    stopped: bool  # it was cancelled before its last batch


LoopAction = Pull | Compute | Push | Settle | EndLease


# The machine ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class PipelineSlot:
    """The place of one batch in hand: for its weights, for its gradient, and until its push is answered.

    Attributes:
        number: place in the rotation.
        reads: by partition, versions of the weights in the slot, or of those that its push was computed from; empty
            while the slot holds neither.
        batch: batch whose push is under way, or None.
        outcomes: outcomes of that push, by partition; None where a partition has not answered.
        wants: True if the receipts of that push bring the weights for the slot's next batch.
    """

    number: int
    reads: list[Version] = field(default_factory=list)
    batch: BatchId | None = None
    outcomes: list[Outcome | None] = field(default_factory=list)
    wants: bool = False

    def answered(self) -> list[Outcome]:
        """Return the outcomes up to the first partition that has not answered."""
        known: list[Outcome] = []
        for outcome in self.outcomes:
            if outcome is None:
                break
            known.append(outcome)
        return known


class WorkerLoop:
    """Decides what one worker does next.

    Args:
        partitions: number of servers; every push is answered by each of them.
        pipeline: batches to compute ahead of the oldest push under way.
        stop_at: staleness, in versions, from which on a finished gradient is not pushed. None: every one is.

    Attributes:
        slots: places of the batches in hand, in the order of their use.
        lease: lease at work, or None.
        computing: slot that is waiting for `Pulled` or `Computed`, or None.
    """

    def __init__(self, partitions: int, pipeline: int = 0, stop_at: int | None = None) -> None:
        self.slots = tuple(PipelineSlot(number) for number in range(pipeline + 1))
        self.lease: int | None = None
        self.computing: PipelineSlot | None = None
        self._partitions = partitions
        self._stop_at = stop_at
        self._cancelled = -1  # leases up to this one are
        self._batches: Sequence[BatchId] = ()
        self._begun = 0  # batches of the lease
        self._pushes: list[PipelineSlot] = []  # under way, the oldest first

    def handle(self, event: LoopEvent) -> tuple[LoopAction, ...]:
        """Take one event.

        Returns:
            The actions that the host carries out now, in this order. While a lease is at work and there is none, the
            next event is a receipt, or the end of what an earlier action began.
        """
        match event:
            # Patterns that bind fields take ten times as long, and every batch comes here three times.
            case ReceiptArrived():
                return self._on_receipt(event.partition, event.receipt)
            case Computed():
                return self._on_computed(event.versions)
            case Pushed():
                return self._go_on()
            case Pulled():
                return self._on_pulled(event.reads)
            case LeaseGranted():
                return self._on_lease(event.lease, event.batches)
            case CalledOff():
                return self._on_called_off()
            case Cancelled():
                self._cancelled = max(self._cancelled, event.lease)
                return ()
            case LeaseFailed():
                return self._on_failed()
            case _:
                assert_never(event)

    def pushing(self, batch: BatchId) -> PipelineSlot | None:
        """Return the slot whose push of `batch` is under way, or None."""
        for slot in self._pushes:
            if slot.batch == batch:
                return slot
        return None

    @property
    def oldest_push(self) -> PipelineSlot | None:
        """Slot of the oldest push under way, or None: the one to wait for when there is nothing else to do."""
        return self._pushes[0] if self._pushes else None

    def _on_lease(self, lease: int, batches: Sequence[BatchId]) -> tuple[LoopAction, ...]:
        assert self.lease is None, f"lease {lease} was granted while lease {self.lease} is at work"
        self.lease = lease
        self._batches = batches
        self._begun = 0
        return self._go_on()

    def _go_on(self) -> tuple[LoopAction, ...]:
        """Begin the next batch if its slot is free; end the lease if nothing is left; else wait for receipts."""
        if self.lease is None or self.computing is not None:
            return ()
        if self._begun < len(self._batches) and self.lease > self._cancelled:
            slot = self.slots[self._begun % len(self.slots)]
            return (self._begin(slot),) if slot.batch is None else ()
        return () if self._pushes else (self._end(self.lease),)

    def _begin(self, slot: PipelineSlot) -> LoopAction:
        self.computing = slot
        self._begun += 1
        return Compute(slot.number, self._batches[self._begun - 1]) if slot.reads else Pull(slot.number)

    def _on_pulled(self, reads: Sequence[Version]) -> tuple[LoopAction, ...]:
        slot = self.computing
        assert slot is not None, "weights came that no slot waits for"
        assert not slot.reads, f"slot {slot.number} holds weights and was given others"
        slot.reads = list(reads)
        return (Compute(slot.number, self._batches[self._begun - 1]),)

    def _on_computed(self, versions: Sequence[Version]) -> tuple[LoopAction, ...]:
        slot = self.computing
        assert slot is not None, "a gradient came that no slot waits for"
        if self._stop_at is not None and _staleness(slot.reads, versions) >= self._stop_at:
            return self._on_called_off()
        self.computing = None
        self._pushes.append(slot)
        slot.batch = batch = self._batches[self._begun - 1]
        slot.outcomes = [None] * self._partitions
        slot.wants = self._begun - 1 + len(self.slots) < len(self._batches)
        return (Push(slot.number, batch, slot.wants),)

    def _on_called_off(self) -> tuple[LoopAction, ...]:
        slot = self.computing
        assert slot is not None, "no computation is under way"
        self.computing = None
        slot.reads = []
        return self._go_on()

    def _on_receipt(self, partition: int, receipt: Receipt) -> tuple[LoopAction, ...]:
        slot = self.pushing(receipt.batch)
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
        return (Settle(slot.number, slot.answered()), *self._go_on())

    def _on_failed(self) -> tuple[LoopAction, ...]:
        settled = tuple(Settle(slot.number, slot.answered()) for slot in self._pushes)
        self._leave()
        return settled

    def _end(self, lease: int) -> LoopAction:
        stopped = self._begun < len(self._batches)
        self._leave()
        return EndLease(lease, stopped)

    def _leave(self) -> None:
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
