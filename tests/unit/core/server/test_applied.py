from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psgd.core.server.applied import AppliedSet
from psgd_workers.messages import BatchId, EpochGrid

GRID = EpochGrid((3, 2), 5)


@given(st.integers(0, 1), st.lists(st.tuples(st.integers(0, 1), st.integers(0, 4)), unique=True))
def test_it_contains_what_was_added_and_counts_complete_epochs(complete: int, added: list[tuple[int, int]]) -> None:
    applied = AppliedSet(GRID)
    added = [(0, position) for position in range(5 * complete)] + [(epoch + complete, n) for epoch, n in added]
    for epoch, position in added:
        applied.add(GRID.batch(epoch, position))
    everything = [(epoch, position) for epoch in range(4) for position in range(5)]
    assert [x for x in everything if GRID.batch(*x) in applied] == sorted(added)
    assert len(applied) == len(added)
    missing = [epoch for epoch, position in everything if (epoch, position) not in added]
    assert applied.epochs == min(missing)
    assert applied.between_epochs == (len(added) == 5 * applied.epochs)


@given(st.permutations(range(10)))
def test_only_open_epochs_have_a_bitmap(order: list[int]) -> None:
    applied = AppliedSet(GRID)
    for number in order:
        applied.add(GRID.batch(number // 5, number % 5))
        for epoch, bitmap in applied.settled().items():
            assert epoch >= applied.epochs
            contained = [GRID.batch(epoch, position) in applied for position in range(5)]
            assert bitmap.tolist() == contained
            assert any(contained)
    assert (applied.epochs, applied.settled()) == (2, {})


def test_it_is_rebuilt_from_its_parts() -> None:
    applied = AppliedSet(GRID, 2, {2: np.array([True, False, True, True, True])})
    assert len(applied) == 14
    assert BatchId(1, 1, 1) in applied
    assert BatchId(2, 0, 1) not in applied
    applied.add(BatchId(2, 0, 1))
    assert applied.epochs == 3


def test_its_arrays_are_its_own() -> None:
    bitmap = np.array([True, False, False, False, False])
    applied = AppliedSet(GRID, 0, {0: bitmap})
    bitmap[:] = True
    applied.settled()[0][:] = True
    assert len(applied) == 1
    assert BatchId(0, 0, 1) not in applied


def test_only_two_epochs_can_be_open() -> None:
    applied = AppliedSet(GRID)
    applied.add(BatchId(1, 0, 0))
    assert BatchId(2, 0, 0) not in applied
    with pytest.raises(AssertionError, match="epoch 2 cannot be open after 0 complete epochs"):
        applied.add(BatchId(2, 0, 0))


def test_adding_twice_is_a_bug_of_the_caller() -> None:
    applied = AppliedSet(GRID)
    applied.add(BatchId(0, 0, 0))
    with pytest.raises(AssertionError):
        applied.add(BatchId(0, 0, 0))
