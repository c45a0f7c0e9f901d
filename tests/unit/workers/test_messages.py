from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psgd_workers.messages import BatchId, BatchRange, EpochGrid, Lease, LeaseEnd, Version

grids = st.lists(st.integers(1, 9), min_size=1, max_size=9).map(lambda counts: EpochGrid(tuple(counts), sum(counts)))


@given(grids, st.integers(0, 1000))
def test_positions_number_an_epochs_batches_in_the_order_of_their_ids(grid: EpochGrid, epoch: int) -> None:
    batches = [grid.batch(epoch, position) for position in range(grid.num_batches)]
    assert batches == [BatchId(epoch, s, i) for s, count in enumerate(grid.batches_per_shard) for i in range(count)]
    assert batches == sorted(batches)


@given(grids)
def test_position_is_the_inverse_of_batch(grid: EpochGrid) -> None:
    positions = range(grid.num_batches)
    assert [grid.position(grid.batch(3, position)) for position in positions] == list(positions)


@given(grids)
def test_a_shard_starts_at_its_batch_0(grid: EpochGrid) -> None:
    for shard in range(len(grid.batches_per_shard)):
        assert grid.batch(0, grid.shard_start(shard)) == BatchId(0, shard, 0)


@pytest.mark.parametrize("position", [-1, 5])
def test_a_position_outside_the_epoch_is_refused(position: int) -> None:
    with pytest.raises(IndexError, match=f"position {position} is outside an epoch of 5 batches"):
        EpochGrid((2, 3), 5).batch(0, position)


def test_a_lease_lists_its_positions_in_the_order_of_work() -> None:
    lease = Lease(7, (BatchRange(1, 4, 10, 3), BatchRange(2, 0, 2)))
    assert list(lease.positions()) == [(1, 4), (1, 7), (2, 0), (2, 1)]
    assert len(lease) == 4


def test_versions_of_a_later_incarnation_are_later() -> None:
    assert Version(1, 900) < Version(2, 30) < Version(2, 31)


def test_messages_are_frozen_and_slotted() -> None:
    end = LeaseEnd(1, stopped=False)
    with pytest.raises(FrozenInstanceError):
        end.stopped = True  # type: ignore[misc]  # refusing this is what is tested
    assert not hasattr(end, "__dict__")
