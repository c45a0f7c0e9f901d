from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psgd_workers.loop import (
    Compute,
    ComputeAborted,
    Computed,
    EndLease,
    LeaseCancelled,
    LeaseFailed,
    LeaseGranted,
    LoopAction,
    LoopEvent,
    Pull,
    Pulled,
    Push,
    Pushed,
    ReceiptArrived,
    Settle,
    WorkerLoop,
)
from psgd_workers.messages import BatchId, Outcome, Receipt, Version

FIRST, SECOND, THIRD, FOURTH = BATCHES = [BatchId(0, 0, index) for index in range(4)]
START = Version(1, 0)
DONE = [Outcome.APPLIED]


def receipt(batch: BatchId, updates: int, partition: int = 0) -> ReceiptArrived:
    return ReceiptArrived(partition, Receipt("worker-3", batch, Outcome.APPLIED, Version(1, updates)))


def handled(loop: WorkerLoop, *events: LoopEvent) -> list[LoopAction]:
    return [action for event in events for action in loop.handle(event)]


def pushed(pipeline: int, partitions: int = 1, batches: Sequence[BatchId] = BATCHES) -> WorkerLoop:
    """Return a loop with a push under way in every slot."""
    loop = WorkerLoop(partitions, pipeline)
    handled(loop, LeaseGranted(7, batches))
    for _ in loop.slots:
        handled(loop, Pulled([START] * partitions), Computed(), Pushed())
    return loop


def test_a_lease_is_pulled_for_once_then_computed_and_pushed_batch_by_batch() -> None:
    loop = WorkerLoop(1)
    assert handled(loop, LeaseGranted(7, [FIRST, SECOND])) == [Pull(0)]
    assert handled(loop, Pulled([START])) == [Compute(0, FIRST)]
    assert handled(loop, Computed()) == [Push(0, FIRST, wants=True)]
    assert handled(loop, Pushed()) == []
    assert handled(loop, receipt(FIRST, 1)) == [Settle(0, DONE), Compute(0, SECOND)]
    assert handled(loop, Computed(), Pushed()) == [Push(0, SECOND, wants=False)]
    assert handled(loop, receipt(SECOND, 2)) == [Settle(0, DONE), EndLease(7, stopped=False)]


def test_a_lease_of_no_batches_ends_at_once() -> None:
    assert handled(WorkerLoop(1), LeaseGranted(7, [])) == [EndLease(7, stopped=False)]


def test_weights_do_not_outlive_a_lease() -> None:
    loop = pushed(0)
    handled(loop, LeaseCancelled(7), receipt(FIRST, 1))
    assert handled(loop, LeaseGranted(8, [SECOND])) == [Pull(0)]


def test_a_pipeline_goes_on_in_the_next_slot_until_that_one_is_under_way() -> None:
    loop = WorkerLoop(1, pipeline=1)
    handled(loop, LeaseGranted(7, BATCHES), Pulled([START]), Computed())
    assert handled(loop, Pushed()) == [Pull(1)]
    assert handled(loop, Pulled([START])) == [Compute(1, SECOND)]
    assert handled(loop, receipt(FIRST, 1)) == [Settle(0, DONE)]
    assert handled(loop, Computed(), Pushed()) == [Push(1, SECOND, wants=True), Compute(0, THIRD)]
    assert loop.slots[0].reads == [Version(1, 1)]


def test_a_receipt_may_come_before_its_push_is_over() -> None:
    loop = WorkerLoop(1)
    handled(loop, LeaseGranted(7, BATCHES), Pulled([START]), Computed())
    assert handled(loop, receipt(FIRST, 1)) == [Settle(0, DONE), Compute(0, SECOND)]
    assert handled(loop, Pushed()) == []


def test_the_next_batch_waits_for_every_partition() -> None:
    loop = pushed(0, partitions=3)
    assert handled(loop, receipt(FIRST, 5, partition=2), receipt(FIRST, 6, partition=0)) == []
    assert handled(loop, receipt(FIRST, 7, partition=1)) == [Settle(0, DONE * 3), Compute(0, SECOND)]
    assert [version.updates for version in loop.slots[0].reads] == [6, 7, 5]


def test_a_slot_whose_turn_it_is_not_waits_with_its_weights() -> None:
    loop = pushed(1)
    assert handled(loop, receipt(SECOND, 1)) == [Settle(1, DONE)]
    assert loop.oldest_push is loop.slots[0]
    assert handled(loop, receipt(FIRST, 2)) == [Settle(0, DONE), Compute(0, THIRD)]


def test_a_receipt_that_came_before_or_is_of_no_push_under_way_changes_nothing() -> None:
    loop = pushed(0, partitions=2)
    handled(loop, receipt(FIRST, 1))
    assert handled(loop, receipt(FIRST, 9), receipt(FOURTH, 9)) == []
    assert loop.slots[0].reads == [Version(1, 1), START]


def test_a_cancelled_lease_ends_once_what_is_under_way_is_answered() -> None:
    loop = pushed(1)
    assert handled(loop, LeaseCancelled(7), receipt(FIRST, 1)) == [Settle(0, DONE)]
    assert handled(loop, receipt(SECOND, 2)) == [Settle(1, DONE), EndLease(7, stopped=True)]


def test_a_lease_cancelled_before_it_came_ends_at_once() -> None:
    assert handled(WorkerLoop(1), LeaseCancelled(8), LeaseGranted(8, BATCHES)) == [EndLease(8, stopped=True)]


def test_a_lease_cancelled_at_its_last_batch_was_not_stopped() -> None:
    loop = pushed(0, batches=[FIRST])
    assert handled(loop, LeaseCancelled(7), receipt(FIRST, 1)) == [Settle(0, DONE), EndLease(7, stopped=False)]


def test_a_computation_that_is_called_off_makes_room_for_the_next_batch_with_new_weights() -> None:
    loop = WorkerLoop(1)
    handled(loop, LeaseGranted(7, [FIRST, SECOND]), Pulled([START]))
    assert handled(loop, ComputeAborted()) == [Pull(0)]
    assert handled(loop, Pulled([START])) == [Compute(0, SECOND)]
    assert handled(loop, ComputeAborted()) == [EndLease(7, stopped=False)]


@pytest.mark.parametrize(("updates", "is_pushed"), [((3, 2), True), ((4, 2), False), ((3, 5), False)])
def test_a_gradient_is_not_pushed_from_some_staleness_on_in_any_partition(
    updates: tuple[int, int], is_pushed: bool
) -> None:
    loop = WorkerLoop(2, stop_at=3)
    handled(loop, LeaseGranted(7, [FIRST, SECOND]), Pulled([Version(1, 1), Version(1, 2)]))
    expected = Push(0, FIRST, wants=True) if is_pushed else Pull(0)
    assert handled(loop, Computed([Version(1, each) for each in updates])) == [expected]


def test_a_failure_settles_what_was_answered_before_the_first_gap() -> None:
    loop = pushed(1, partitions=3)
    handled(loop, receipt(FIRST, 1), receipt(FIRST, 1, partition=2), receipt(SECOND, 1, partition=1))
    assert handled(loop, LeaseFailed()) == [Settle(0, DONE), Settle(1, [])]
    assert handled(loop, receipt(FIRST, 2, partition=1)) == []
    assert handled(loop, LeaseGranted(8, [FIRST])) == [Pull(0)]


def test_a_failure_between_leases_settles_nothing() -> None:
    assert handled(WorkerLoop(1), LeaseFailed()) == []


def test_one_lease_at_a_time() -> None:
    with pytest.raises(AssertionError, match="lease 8 was granted before lease 7 ended"):
        pushed(0).handle(LeaseGranted(8, BATCHES))


class RandomOrderHost:
    """A host that reports events to a loop in a random possible order, and checks the loop's rules at each action.

    Args:
        random: generator that draws the next event.
        partitions: number of servers.
        pipeline: `pipeline` of the loop.
        stop_at: `stop_at` of the loop.
    """

    def __init__(self, random: Random, partitions: int, pipeline: int, stop_at: int | None) -> None:
        self.loop = WorkerLoop(partitions, pipeline, stop_at)
        self.random = random
        self.partitions = partitions
        self.stop_at = stop_at
        self.updates = 0  # version of the servers
        self.sending = 0  # pushes that have not been reported as sent
        self.lease = -1  # number of the last lease
        self.at_work = False
        self.cancelled = -1
        self.ended = 0
        self.clear()

    def clear(self) -> None:
        self.batches: list[BatchId] = []
        self.computed: list[BatchId] = []
        self.current: Pull | Compute | None = None
        self.held: dict[int, list[Version]] = {}  # versions of the weights held, by slot
        self.under_way: dict[int, Push] = {}  # pushes under way, by slot, in the order of the pushes
        self.outcomes: dict[int, list[Outcome | None]] = {}  # outcomes of a push under way, by slot, then by partition
        self.read: dict[int, list[Version]] = {}  # expected `PipelineSlot.reads` of a push under way, by slot

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.random.choice(self.possible())()
            self.check()

    def possible(self) -> list[Callable[[], None]]:
        found = [self.send_stray_receipt] if self.random.random() < 0.9 else [self.cancel, self.fail]
        if not self.at_work:
            found.append(self.grant)
        if self.under_way:
            found += [self.answer] * 3
        if self.sending:
            found.append(self.send)
        if isinstance(self.current, Pull):
            found.append(self.pull)
        if isinstance(self.current, Compute):
            found += [self.compute, self.compute, self.abort]
        return found

    # Events

    def grant(self) -> None:
        self.lease += 1
        self.at_work = True
        self.batches = [BatchId(0, 0, index) for index in range(self.random.randrange(12))]
        self.take(LeaseGranted(self.lease, self.batches))

    def cancel(self) -> None:
        lease = self.lease + self.random.choice((-1, 0, 1))
        self.cancelled = max(self.cancelled, lease)
        assert self.take(LeaseCancelled(lease)) == ()

    def pull(self) -> None:
        assert self.current
        reads = [Version(1, self.updates)] * self.partitions
        self.held[self.current.slot] = list(reads)
        (action,) = self.take(Pulled(reads))
        assert isinstance(action, Compute)

    def compute(self) -> None:
        assert self.current
        aheads = [self.random.choice((0, 0, 1, 2, 3)) for _ in range(self.partitions)]
        reads = self.held[self.current.slot]
        versions = [Version(1, read.updates + ahead) for read, ahead in zip(reads, aheads, strict=True)]
        is_stale = self.stop_at is not None and max(aheads) >= self.stop_at
        if is_stale:
            self.expect_dropped()
        actions = self.take(Computed(versions))
        assert is_stale != any(isinstance(action, Push) for action in actions)

    def abort(self) -> None:
        self.expect_dropped()
        self.take(ComputeAborted())

    def expect_dropped(self) -> None:
        assert self.current
        self.held.pop(self.current.slot)
        self.current = None

    def send(self) -> None:
        self.sending -= 1
        self.take(Pushed())

    def answer(self) -> None:
        slot = self.random.choice(list(self.under_way))
        batch = self.under_way[slot].batch
        known = self.outcomes[slot]
        gaps = [partition for partition, outcome in enumerate(known) if outcome is None]
        partition = self.random.choice(gaps)
        self.updates += 1
        receipt = Receipt("worker-3", batch, self.random.choice(list(Outcome)), Version(1, self.updates))
        known[partition] = receipt.outcome
        self.read[slot][partition] = receipt.version
        assert bool(self.take(ReceiptArrived(partition, receipt))) == (len(gaps) == 1)

    def send_stray_receipt(self) -> None:
        """Report a receipt that the loop ignores: its push is not under way, or its partition has answered."""
        index = self.random.randrange(12)
        partition = self.random.randrange(self.partitions)
        stray = Receipt("worker-3", BatchId(0, 0, index), Outcome.DUPLICATE, START)
        for slot, push in self.under_way.items():
            if push.batch == stray.batch and self.outcomes[slot][partition] is None:
                return
        assert self.take(ReceiptArrived(partition, stray)) == ()

    def fail(self) -> None:
        self.take(LeaseFailed())
        assert not self.under_way
        self.at_work = False
        self.clear()

    # Actions

    def take(self, event: LoopEvent) -> tuple[LoopAction, ...]:
        actions = self.loop.handle(event)
        for action in actions:
            match action:
                case Pull():
                    self.begin(action.slot)
                    assert action.slot not in self.held
                    self.current = action
                case Compute():
                    self.on_compute(action)
                case Push():
                    assert isinstance(event, Computed)
                    self.on_push(action)
                case Settle():
                    self.on_settle(action, failed=isinstance(event, LeaseFailed))
                case EndLease():
                    self.on_end(action)
        return actions

    def begin(self, slot: int) -> None:
        assert self.at_work
        assert self.lease > self.cancelled
        assert self.current is None
        assert slot == len(self.computed) % len(self.loop.slots)
        assert slot not in self.under_way
        assert len(self.under_way) < len(self.loop.slots)

    def on_compute(self, action: Compute) -> None:
        if not isinstance(self.current, Pull):
            self.begin(action.slot)
        assert action.batch == self.batches[len(self.computed)]
        assert action.slot in self.held
        self.computed.append(action.batch)
        self.current = action

    def on_push(self, action: Push) -> None:
        assert self.current == Compute(action.slot, action.batch)
        assert action.wants == (len(self.computed) - 1 + len(self.loop.slots) < len(self.batches))
        self.current = None
        self.sending += 1
        self.under_way[action.slot] = action
        self.outcomes[action.slot] = [None] * self.partitions
        self.read[action.slot] = self.held.pop(action.slot)

    def on_settle(self, action: Settle, failed: bool) -> None:
        push = self.under_way.pop(action.slot)
        known = list(takewhile(lambda outcome: outcome is not None, self.outcomes.pop(action.slot)))
        assert list(action.outcomes) == known
        assert failed or len(known) == self.partitions
        if push.wants:
            self.held[action.slot] = self.read[action.slot]

    def on_end(self, action: EndLease) -> None:
        assert self.at_work
        assert self.current is None
        assert not self.under_way
        assert action == EndLease(self.lease, stopped=len(self.computed) < len(self.batches))
        assert not action.stopped or self.lease <= self.cancelled
        self.at_work = False
        self.ended += 1
        self.clear()

    def check(self) -> None:
        """Check that a lease at work waits for an event, and that the loop's state matches this host's records."""
        assert not self.at_work or self.current or self.under_way
        assert self.loop.lease == (self.lease if self.at_work else None)
        assert (self.loop.computing and self.loop.computing.number) == (self.current and self.current.slot)
        assert (self.loop.oldest_push and self.loop.oldest_push.number) == next(iter(self.under_way), None)
        for slot in self.loop.slots:
            weights = self.read if slot.number in self.under_way else self.held
            assert slot.reads == weights.get(slot.number, [])


@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(0, 3), st.sampled_from([None, 2]))
def test_the_rules_hold_whatever_comes_in_whatever_order(
    seed: int, partitions: int, pipeline: int, stop_at: int | None
) -> None:
    host = RandomOrderHost(Random(seed), partitions, pipeline, stop_at)  # noqa: S311 - no secret
    host.run(300)
    assert host.ended
