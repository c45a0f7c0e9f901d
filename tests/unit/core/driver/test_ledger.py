from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psgd.core.driver.ledger import Ledger, _ranges
from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.partitions import Partition
from psgd.core.server.report import Report
from psgd_workers.messages import EpochGrid, Lease, Version
from tests.support.jobs import GRID, START, job

SIZE = GRID.num_batches


def report(contained: Collection[int], epoch: int = 0, partition: int = 0) -> Report:
    """Return the report of a partition that contains every epoch before `epoch`, and these positions of `epoch`."""
    empty = ParameterServer(job(), Partition(partition, 0, 6, 6), START, GRID, Version(1, 0)).report()
    if len(contained) == SIZE:
        return replace(empty, epochs=epoch + 1)
    bitmap = np.isin(np.arange(SIZE), list(contained))
    return replace(empty, epochs=epoch, settled={epoch: bitmap} if contained else {})


def granted(ledger: Ledger, batches: int, home: Fraction = Fraction(0)) -> Lease:
    lease = ledger.grant(batches, home)
    assert lease
    return lease


def positions(lease: Lease | None) -> list[int]:
    return [position for _, position in lease.positions()] if lease else []


def settle(ledger: Ledger, lease: Lease, contained: Collection[int], epoch: int = 0) -> None:
    ledger.close(lease.id)
    ledger.reported(report(contained, epoch), ledger.next_stamp())


# Ranges


@given(st.lists(st.integers(0, 60)))
def test_ranges_keep_every_position_and_their_order(places: list[int]) -> None:
    ranges = _ranges(3, np.array(places, np.int64))
    assert [position for r in ranges for position in r.positions()] == places
    assert {r.epoch for r in ranges} <= {3}


@given(st.integers(0, 20), st.integers(1, 9), st.integers(1, 30))
def test_an_arithmetic_sequence_is_one_range(start: int, step: int, length: int) -> None:
    assert len(_ranges(0, np.arange(start, start + step * length, step))) == 1


# Leases


def test_leases_divide_an_epoch_in_order() -> None:
    ledger = Ledger(GRID)
    leases = [ledger.grant(4) for _ in range(4)]
    assert [positions(lease) for lease in leases] == [[0, 1, 2, 3], [4, 5, 6, 7], [8], []]
    assert leases[3] is None
    assert (ledger.pending, ledger.outstanding, ledger.done) == (0, SIZE, 0)


def test_nothing_is_granted_for_nothing() -> None:
    ledger = Ledger(GRID)
    assert ledger.grant(0) is None
    assert ledger.settled


def test_a_worker_begins_with_its_own_shards_and_helps_the_others_after() -> None:
    ledger = Ledger(EpochGrid((2, 2, 2, 2), 8))
    assert positions(ledger.grant(2, home=Fraction(0))) == [0, 1]
    assert positions(ledger.grant(3, home=Fraction(1, 2))) == [4, 5, 6]
    assert positions(ledger.grant(9, home=Fraction(1, 2))) == [7, 2, 3]


@pytest.mark.parametrize("workers", [3, 49, 100, 4096])
def test_with_a_shard_for_each_every_worker_begins_with_its_own(workers: int) -> None:
    ledger = Ledger(EpochGrid((1,) * workers, workers))
    for slot in range(0, workers, workers // 49 + 1):
        assert positions(ledger.grant(1, Fraction(slot, workers))) == [slot]


def test_stripes_give_round_r_the_positions_from_r_times_n_on() -> None:
    ledger = Ledger(GRID)
    leases = ledger.grant_striped(3, rounds=2)
    assert [positions(lease) for lease in leases] == [[0, 3], [1, 4], [2, 5]]
    assert all(len(lease.batches) == 1 for lease in leases)
    leases = ledger.grant_striped(2, rounds=5)
    assert [positions(lease) for lease in leases] == [[6, 8], [7]]
    assert ledger.grant_striped(2, rounds=5) == ()


def test_the_last_round_may_leave_some_without() -> None:
    ledger = Ledger(EpochGrid((4,), 4))
    assert [positions(lease) for lease in ledger.grant_striped(3, 2)] == [[0, 3], [1], [2]]
    assert len(Ledger(EpochGrid((1,), 1)).grant_striped(2, 1)) == 1


# Doubts and reports


def test_what_a_report_contains_is_done_and_the_rest_is_leased_again() -> None:
    ledger = Ledger(GRID)
    settle(ledger, granted(ledger, 4), contained=[0, 2])
    assert (ledger.done, ledger.requeued, ledger.settled) == (2, 2, True)
    assert positions(ledger.grant(SIZE)) == [1, 3, 4, 5, 6, 7, 8]


def test_a_report_asked_before_the_closing_settles_nothing() -> None:
    ledger = Ledger(GRID)
    lease = granted(ledger, 4)
    asked = ledger.next_stamp()
    ledger.close(lease.id)
    ledger.reported(report([0]), asked)
    assert (ledger.done, ledger.outstanding, ledger.settled, ledger.requeued) == (1, 3, False, 0)
    assert ledger.newest_doubt > asked
    assert positions(ledger.grant(1)) == [4]


def test_an_open_lease_is_not_settled() -> None:
    ledger = Ledger(GRID)
    granted(ledger, 4)
    ledger.reported(report([]), ledger.next_stamp())
    assert (ledger.settled, ledger.outstanding, ledger.newest_doubt) == (False, 4, 0)


def test_leases_are_settled_one_by_one() -> None:
    ledger = Ledger(GRID)
    first = granted(ledger, 2)
    second = granted(ledger, 2)
    ledger.close(first.id)
    asked = ledger.next_stamp()
    ledger.close(second.id)
    ledger.reported(report([]), asked)
    assert positions(ledger.grant(3)) == [0, 1, 4]


def test_closing_twice_is_a_bug_of_the_caller() -> None:
    ledger = Ledger(GRID)
    lease = granted(ledger, 4)
    ledger.close(lease.id)
    with pytest.raises(AssertionError):
        ledger.close(lease.id)


def test_a_batch_that_one_of_two_partitions_lacks_is_leased_again() -> None:
    ledger = Ledger(GRID, partitions=2)
    lease = granted(ledger, 3)
    ledger.close(lease.id)
    ledger.reported(report([0, 1, 2]), ledger.next_stamp())
    assert not ledger.settled  # the other partition has not reported since the lease closed
    ledger.reported(report([0, 2], partition=1), ledger.next_stamp())
    assert (ledger.settled, ledger.done, ledger.requeued) == (True, 2, 1)
    assert positions(ledger.grant(1)) == [1]


def test_two_reports_of_one_partition_do_not_settle_for_the_other() -> None:
    ledger = Ledger(GRID, partitions=2)
    ledger.close(granted(ledger, 3).id)
    for _ in range(2):
        ledger.reported(report([0, 1, 2]), ledger.next_stamp())
    assert not ledger.settled


def test_an_epoch_is_complete_when_every_partition_contains_it() -> None:
    ledger = Ledger(GRID, partitions=2)
    ledger.reported(report(range(SIZE)), ledger.next_stamp())
    assert not ledger.complete
    ledger.reported(report(range(SIZE), partition=1), ledger.next_stamp())
    assert ledger.complete


# Epochs


def test_the_next_epoch_begins_while_a_leases_return_is_still_under_way() -> None:
    ledger = Ledger(GRID)
    late = granted(ledger, 5)
    doubtful = granted(ledger, 4)
    ledger.close(doubtful.id)
    ledger.reported(report(range(SIZE)), asked=0)
    assert ledger.complete
    ledger.start_epoch(1)
    ledger.reported(report([], epoch=1), asked=0)
    assert (ledger.pending, ledger.done, ledger.requeued) == (SIZE, 0, 0)
    assert not ledger.settled
    new = granted(ledger, 3)
    assert new.batches[0].epoch == 1
    assert new.id not in (late.id, doubtful.id)
    ledger.close(late.id)
    ledger.reported(report([], epoch=1), ledger.next_stamp())
    assert (ledger.outstanding, ledger.requeued) == (3, 0)
    settle(ledger, new, contained=[0, 1, 2], epoch=1)
    assert (ledger.settled, ledger.requeued, ledger.done) == (True, 0, 3)


def test_a_report_of_a_later_epoch_contains_this_one_and_of_an_earlier_one_nothing_of_it() -> None:
    ledger = Ledger(GRID)
    ledger.start_epoch(2)
    ledger.reported(report([0, 1], epoch=1), ledger.next_stamp())
    assert ledger.done == 0
    ledger.reported(report([], epoch=3), ledger.next_stamp())
    assert ledger.complete


@given(st.data())
def test_every_batch_is_leased_until_it_is_contained_whatever_is_lost(data: st.DataObject) -> None:
    ledger = Ledger(GRID)
    contained: set[int] = set()
    out: list[Lease] = []
    for _ in range(data.draw(st.integers(0, 20))):
        lease = ledger.grant(data.draw(st.integers(1, 5)))
        out += [lease] if lease else []
        closes: bool = data.draw(st.booleans())
        if out and closes:
            closed = out.pop(data.draw(st.integers(0, len(out) - 1)))
            arrived = data.draw(st.sets(st.sampled_from(positions(closed))))
            contained |= arrived
            settle(ledger, closed, contained)
        assert ledger.pending + ledger.outstanding + ledger.done == SIZE
        on_lease = [position for lease in out for position in positions(lease)]
        assert len(set(on_lease)) == len(on_lease) == ledger.outstanding
        assert ledger.done == len(contained)


# Second leases, suspects and withheld batches


def test_the_end_of_a_lease_is_taken_over_and_its_worker_goes_on_from_the_front() -> None:
    ledger = Ledger(GRID)
    slow = granted(ledger, SIZE)
    ledger.reported(report([0, 1]), ledger.next_stamp())
    assert ledger.left(slow.id) == 7
    assert positions(ledger.take_over(slow.id, 4)) == [5, 6, 7, 8]
    assert (ledger.left(slow.id), ledger.outstanding, ledger.shared) == (3, 7, {slow.id})
    assert positions(ledger.take_over(slow.id, 5)) == [2, 3, 4]
    assert ledger.take_over(slow.id, 1) is None


def test_a_lease_is_done_when_others_have_done_what_it_lacks() -> None:
    ledger = Ledger(GRID)
    slow = granted(ledger, 4)
    ledger.reported(report([0, 1, 2]), ledger.next_stamp())
    assert not ledger.is_done(slow.id)
    ledger.reported(report([0, 1, 2, 3]), ledger.next_stamp())
    assert ledger.is_done(slow.id)


def test_what_was_taken_over_is_leased_again_only_if_both_lose_it() -> None:
    ledger = Ledger(GRID)
    slow = granted(ledger, 4)
    second = ledger.take_over(slow.id, 2)
    assert second
    settle(ledger, second, contained=[])
    assert (ledger.requeued, ledger.pending) == (0, SIZE - 4)  # the first lease may still push them
    settle(ledger, slow, contained=[0, 1])
    assert ledger.requeued == 2
    assert positions(ledger.grant(2)) == [2, 3]


def test_a_suspect_is_leased_first_and_by_itself() -> None:
    ledger = Ledger(GRID)
    settle(ledger, granted(ledger, 4), contained=[0])
    ledger.isolate(1)
    assert (ledger.suspects, ledger.pending) == (1, SIZE - 1)
    assert positions(ledger.grant(9)) == [1]
    assert positions(ledger.grant(9)) == [2, 3, 4, 5, 6, 7, 8]


def test_what_is_withheld_is_never_leased_again_in_its_epoch() -> None:
    ledger = Ledger(GRID)
    lease = granted(ledger, 2)
    ledger.withhold(1)  # leased
    ledger.withhold(4)  # pending
    settle(ledger, lease, contained=[])
    assert positions(ledger.grant(SIZE)) == [0, 2, 3, 5, 6, 7, 8]
    ledger.start_epoch(1)
    assert len(granted(ledger, SIZE)) == SIZE


# Restored partitions


def test_what_a_restored_partition_lacks_is_leased_again_unless_it_is_out() -> None:
    ledger = Ledger(GRID, partitions=2)
    out = granted(ledger, 3)
    closed = granted(ledger, 3)
    ledger.close(closed.id)
    for partition in range(2):
        ledger.reported(report([0, 1, 3, 4, 5], partition=partition), ledger.next_stamp())
    assert (ledger.done, ledger.settled) == (5, False)
    ledger.reported(report([3], partition=1), ledger.next_stamp())
    assert (ledger.done, ledger.requeued) == (1, 2)
    assert positions(ledger.grant(2)) == [4, 5]
    ledger.close(out.id)
    for partition in range(2):
        ledger.reported(report([3], partition=partition), ledger.next_stamp())
    assert positions(ledger.grant(3)) == [0, 1, 2]


def test_an_epoch_that_is_turned_back_to_leaves_the_later_ones_leases_to_their_ends() -> None:
    ledger = Ledger(GRID)
    ledger.start_epoch(1)
    later = granted(ledger, 4)
    ledger.start_epoch(0)
    ledger.reported(report([0]), asked=0)
    assert (ledger.done, ledger.pending, ledger.left(later.id)) == (1, SIZE - 1, 0)
    ledger.close(later.id)
    ledger.reported(report([0]), ledger.next_stamp())
    assert (ledger.settled, ledger.requeued) == (True, 0)
