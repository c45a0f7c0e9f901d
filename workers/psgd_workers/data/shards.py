"""Which examples make which batch: a function of the seed, the epoch and the shard, and of nothing else.

The training examples are cut once, from one seeded permutation of all of them, into shards; every epoch shuffles each
shard by itself. The generators are NumPy's, told apart by the `spawn_key` of one `SeedSequence` (a longer entropy list
would not do: it is padded with zeros, so that `[seed]` and `[seed, 0, 0]` are the same stream).
See https://numpy.org/doc/stable/reference/random/parallel.html.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from psgd_workers.errors import DataError
from psgd_workers.messages import BatchId, EpochGrid

__all__ = ["Shards"]

CACHED_ORDERS = 4  # a worker goes through one shard at a time, and its pipeline may straddle two


class Shards:
    """The training examples in `num_shards` pieces, whose sizes differ by at most one, and their batches.

    Attributes:
        grid: how many batches each shard has, every epoch.
    """

    def __init__(
        self, num_examples: int, num_shards: int, batch_size: int, seed: int, shuffle: bool, steps: int = 1
    ) -> None:
        """Cut the examples into shards.

        Args:
            num_examples: examples in the training part.
            num_shards: pieces to cut them into.
            batch_size: examples per batch; a shard's last batch may be shorter.
            seed: of the job, not negative.
            shuffle: False keeps the order of the file, in the cut and in every epoch.
            steps: mini-batches of `batch_size` that make one batch, which is what a push is computed from.

        Raises:
            DataError: a shard would be smaller than one batch.
        """
        _check_sizes(num_examples, num_shards, batch_size)
        self._mini_batch_size = batch_size
        self._batch_size = batch_size * steps
        self._seed = seed
        self._shuffle = shuffle
        self._shards = np.array_split(self._shuffled(np.arange(num_examples, dtype=np.int64)), num_shards)
        self._orders: dict[tuple[int, int], NDArray[np.int64]] = {}  # by (epoch, shard), oldest first
        self.grid = EpochGrid(tuple(-(-len(shard) // self._batch_size) for shard in self._shards), num_examples)

    def examples(self, batch: BatchId) -> NDArray[np.int64]:
        """The row numbers of a batch's examples, `[batch_size · steps]` or fewer at a shard's end; read-only."""
        if not 0 <= batch.shard < len(self._shards) or not 0 <= batch.index < self.grid.batches_per_shard[batch.shard]:
            raise IndexError(f"{batch} is outside an epoch with {self.grid.batches_per_shard} batches per shard")
        start = batch.index * self._batch_size
        return self._order(batch.epoch, batch.shard)[start : start + self._batch_size]

    def mini_batches(self, batch: BatchId) -> list[NDArray[np.int64]]:
        """The rows of each mini-batch of a batch, in order; the last one may be shorter."""
        rows = self.examples(batch)
        size = self._mini_batch_size
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _order(self, epoch: int, shard: int) -> NDArray[np.int64]:
        order = self._orders.get((epoch, shard))
        if order is None:
            order = self._shuffled(self._shards[shard], epoch, shard)
            order.flags.writeable = False
            if len(self._orders) == CACHED_ORDERS:
                del self._orders[next(iter(self._orders))]
            self._orders[epoch, shard] = order
        return order

    def _shuffled(self, rows: NDArray[np.int64], *key: int) -> NDArray[np.int64]:
        if not self._shuffle:
            return rows
        return np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=key)).permutation(rows)


def _check_sizes(num_examples: int, num_shards: int, batch_size: int) -> None:
    if num_examples == 0:
        raise DataError("there are no training examples: expected at least one")
    if num_shards > num_examples:
        raise DataError(f"{num_examples} examples cannot fill {num_shards} shards; lower num_shards")
    smallest = num_examples // num_shards
    if batch_size > smallest:
        raise DataError(
            f"batch_size {batch_size} is larger than a shard: {num_examples} examples in {num_shards} shards make "
            f"shards of {smallest}; lower batch_size or num_shards"
        )
