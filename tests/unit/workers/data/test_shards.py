from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from psgd_workers.data.shards import CACHED_ORDERS, Shards
from psgd_workers.errors import DataError
from psgd_workers.messages import BatchId


class Sizes(NamedTuple):
    num_examples: int
    num_shards: int
    batch_size: int


@st.composite
def any_sizes(draw: st.DrawFn) -> Sizes:
    num_examples = draw(st.integers(1, 200))
    num_shards = draw(st.integers(1, num_examples))
    return Sizes(num_examples, num_shards, draw(st.integers(1, num_examples // num_shards)))


seeds = st.integers(0, 2**64)
epochs = st.integers(0, 10**6)


def epoch_of(shards: Shards, epoch: int) -> list[NDArray[np.int64]]:
    """Return the rows of each batch of an epoch, by position."""
    return [shards.rows(shards.grid.batch(epoch, position)) for position in range(shards.grid.num_batches)]


@given(any_sizes(), seeds, epochs, st.booleans())
def test_every_epoch_covers_every_example_exactly_once(sizes: Sizes, seed: int, epoch: int, shuffle: bool) -> None:
    rows = np.concatenate(epoch_of(Shards(*sizes, seed, shuffle), epoch))
    assert rows.dtype == np.int64
    np.testing.assert_array_equal(np.sort(rows), np.arange(sizes.num_examples))


@given(any_sizes(), seeds)
def test_every_batch_is_full_but_a_shards_last(sizes: Sizes, seed: int) -> None:
    shards = Shards(*sizes, seed, shuffle=True)
    shard_sizes = []
    for shard, count in enumerate(shards.grid.batches_per_shard):
        lengths = [len(shards.rows(BatchId(0, shard, index))) for index in range(count)]
        assert all(length == sizes.batch_size for length in lengths[:-1])
        assert 1 <= lengths[-1] <= sizes.batch_size
        shard_sizes.append(sum(lengths))
    assert max(shard_sizes) - min(shard_sizes) <= 1


@given(any_sizes(), seeds, st.lists(epochs, min_size=2, max_size=2, unique=True))
def test_a_shard_has_the_same_members_in_every_epoch(sizes: Sizes, seed: int, two: list[int]) -> None:
    shards = Shards(*sizes, seed, shuffle=True)
    for shard, count in enumerate(shards.grid.batches_per_shard):
        first, second = (
            {row for index in range(count) for row in shards.rows(BatchId(epoch, shard, index)).tolist()}
            for epoch in two
        )
        assert first == second


@given(any_sizes(), seeds, st.data())
def test_a_batch_does_not_depend_on_what_was_asked_before(sizes: Sizes, seed: int, data: st.DataObject) -> None:
    shards = Shards(*sizes, seed, shuffle=True)
    positions = st.integers(0, shards.grid.num_batches - 1)
    for epoch, position in data.draw(st.lists(st.tuples(st.integers(0, 3), positions), max_size=20)):
        batch = shards.grid.batch(epoch, position)
        np.testing.assert_array_equal(shards.rows(batch), Shards(*sizes, seed, shuffle=True).rows(batch))


def test_the_order_does_not_depend_on_the_batch_size() -> None:
    orders = [np.concatenate(epoch_of(Shards(100, 1, size, 5, shuffle=True), 2)) for size in (1, 7, 100)]
    np.testing.assert_array_equal(orders[0], orders[1])
    np.testing.assert_array_equal(orders[0], orders[2])


@pytest.mark.parametrize("num_shards", [1, 3])
def test_epochs_and_seeds_have_orders_of_their_own(num_shards: int) -> None:
    orders = {
        tuple(np.concatenate(epoch_of(Shards(50, num_shards, 8, seed, shuffle=True), epoch)).tolist())
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(orders) == 16


def test_shards_of_one_size_are_not_shuffled_alike() -> None:
    shards = Shards(200, 2, 100, 0, shuffle=True)
    first, second = (np.argsort(np.argsort(rows)) for rows in epoch_of(shards, 0))
    assert not np.array_equal(first, second)


def test_the_cut_and_the_first_order_are_not_the_same_permutation() -> None:
    cut = np.random.default_rng(np.random.SeedSequence(3)).permutation(100)
    (order,) = epoch_of(Shards(100, 1, 100, 3, shuffle=True), 0)
    assert not np.array_equal(order, cut[cut])


@given(any_sizes(), seeds, epochs)
def test_without_shuffling_every_epoch_is_the_file_from_first_to_last(sizes: Sizes, seed: int, epoch: int) -> None:
    rows = np.concatenate(epoch_of(Shards(*sizes, seed, shuffle=False), epoch))
    np.testing.assert_array_equal(rows, np.arange(sizes.num_examples))


def test_every_example_comes_first_about_equally_often() -> None:
    shards = Shards(4, 1, 1, 0, shuffle=True)
    firsts = np.concatenate([shards.rows(BatchId(epoch, 0, 0)) for epoch in range(4000)])
    counts = np.bincount(firsts, minlength=4)
    assert np.square(counts - 1000).sum() / 1000 < 16.3  # chi-squared, 3 degrees of freedom, p = 0.001


def test_few_orders_are_kept() -> None:
    shards = Shards(100, 4, 5, 0, shuffle=True)
    for epoch in range(5):
        epoch_of(shards, epoch)
    assert len(shards._orders) == CACHED_ORDERS


def test_consecutive_batches_of_a_shard_share_one_order() -> None:
    shards = Shards(100, 1, 10, 0, shuffle=True)
    first, second = (shards.rows(BatchId(0, 0, index)) for index in range(2))
    assert first.base is second.base
    assert not first.flags.writeable


@pytest.mark.parametrize("batch", [BatchId(0, 2, 0), BatchId(0, -1, 0), BatchId(0, 0, 5), BatchId(0, 0, -1)])
def test_a_batch_outside_the_grid_is_refused(batch: BatchId) -> None:
    with pytest.raises(IndexError, match=r"outside an epoch with \(5, 5\) batches per shard"):
        Shards(20, 2, 2, 0, shuffle=True).rows(batch)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            Sizes(100, 4, 64),
            "batch_size 64 is larger than a shard: 100 examples in 4 shards make shards of 25; "
            "lower batch_size or num_shards",
        ),
        (Sizes(101, 4, 26), "make shards of 25;"),
        (Sizes(3, 4, 1), "3 examples cannot fill 4 shards; lower num_shards"),
        (Sizes(0, 1, 1), "there are no training examples"),
    ],
)
def test_sizes_that_make_no_batch_are_refused(sizes: Sizes, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        Shards(*sizes, seed=0, shuffle=True)


# drop_last


@given(any_sizes(), seeds, epochs, st.booleans(), st.integers(1, 3))
def test_drop_last_leaves_out_what_fills_no_batch_and_nothing_else(
    sizes: Sizes, seed: int, epoch: int, shuffle: bool, steps: int
) -> None:
    kept, shards = (Shards(*sizes, seed, shuffle, steps, drop_last) for drop_last in (False, True))
    batches = [shards.mini_batches(shards.grid.batch(epoch, number)) for number in range(shards.grid.num_batches)]
    assert all(len(rows) == sizes.batch_size for batch in batches for rows in batch)
    trained = np.concatenate([rows for batch in batches for rows in batch])
    assert (
        len(trained) == len(set(trained.tolist())) == shards.grid.num_examples == sizes.num_examples - shards.left_out
    )
    full = [
        rows
        for number in range(kept.grid.num_batches)
        for rows in kept.mini_batches(kept.grid.batch(epoch, number))
        if len(rows) == sizes.batch_size
    ]
    np.testing.assert_array_equal(trained, np.concatenate(full))  # in the same order as without drop_last
    assert kept.left_out == 0


def test_drop_last_leaves_out_others_in_each_epoch_if_they_are_shuffled() -> None:
    for shuffle, expected in ((True, 10), (False, 1)):
        shards = Shards(10, 1, 9, 0, shuffle, drop_last=True)
        left = {(set(range(10)) - set(shards.rows(BatchId(epoch, 0, 0)).tolist())).pop() for epoch in range(100)}
        assert len(left) == expected


@given(any_sizes(), seeds, st.integers(1, 3), st.booleans())
def test_the_smallest_mini_batch_is_the_smallest(sizes: Sizes, seed: int, steps: int, drop_last: bool) -> None:
    shards = Shards(*sizes, seed, shuffle=True, steps=steps, drop_last=drop_last)
    lengths = [
        len(rows)
        for number in range(shards.grid.num_batches)
        for rows in shards.mini_batches(shards.grid.batch(0, number))
    ]
    assert len(shards.smallest_mini_batch()) == min(lengths)
