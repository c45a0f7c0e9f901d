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
        grid: how many batches each shard has, every epoch, and how many examples they hold.
        left_out: examples that no batch of an epoch holds; 0 without `drop_last`.
    """

    def __init__(
        self,
        num_examples: int,
        num_shards: int,
        batch_size: int,
        seed: int,
        shuffle: bool,
        steps: int = 1,
        drop_last: bool = False,
    ) -> None:
        """Cut the examples into shards.

        Args:
            num_examples: examples in the training part.
            num_shards: pieces to cut them into.
            batch_size: examples per batch; a shard's last batch may be shorter.
            seed: of the job, not negative.
            shuffle: False keeps the order of the file, in the cut and in every epoch.
            steps: mini-batches of `batch_size` that make one batch, which is what a push is computed from.
            drop_last: True ends each epoch's order of a shard with its last full mini-batch.

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
        rests = [len(shard) % batch_size if drop_last else 0 for shard in self._shards]
        self._sizes = [len(shard) - rest for shard, rest in zip(self._shards, rests, strict=True)]
        self.left_out = sum(rests)
        batches = tuple(-(-size // self._batch_size) for size in self._sizes)
        self.grid = EpochGrid(batches, num_examples - self.left_out)

    def examples(self, batch: BatchId) -> NDArray[np.int64]:
        """The row numbers of a batch's examples, `[batch_size · steps]` or fewer at a shard's end; read-only."""
        if not 0 <= batch.shard < len(self._shards) or not 0 <= batch.index < self.grid.batches_per_shard[batch.shard]:
            raise IndexError(f"{batch} is outside an epoch with {self.grid.batches_per_shard} batches per shard")
        start = batch.index * self._batch_size
        stop = min(start + self._batch_size, self._sizes[batch.shard])
        return self._order(batch.epoch, batch.shard)[start:stop]

    def mini_batches(self, batch: BatchId) -> list[NDArray[np.int64]]:
        """The rows of each mini-batch of a batch, in order; the last one may be shorter."""
        rows = self.examples(batch)
        size = self._mini_batch_size
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def smallest_mini_batch(self) -> NDArray[np.int64]:
        """Return the rows of the shortest mini-batch of the first epoch; those of every other epoch are no shorter."""
        lasts = [BatchId(0, shard, batches - 1) for shard, batches in enumerate(self.grid.batches_per_shard)]
        return min((self.mini_batches(batch)[-1] for batch in lasts), key=len)

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
