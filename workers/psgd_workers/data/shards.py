"""Assigns the training examples to batches: a function of the seed, the epoch and the shard, and of nothing else.

With `shuffle`, the examples are permuted once at random before they are cut into shards, and in each epoch every shard
is shuffled separately. Without it, the order of the file is kept. All random generators share the seed of the job, and
differ in the `spawn_key` of their `SeedSequence`. (Entropy lists of different lengths are no replacement: NumPy pads
them with zeros, so that `[seed]` and `[seed, 0, 0]` are the same stream.)

References:
    https://numpy.org/doc/stable/reference/random/parallel.html
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from psgd_workers.counting import counted
from psgd_workers.errors import DataError
from psgd_workers.messages import BatchId, EpochGrid

__all__ = ["Shards"]

CACHED_ORDERS = 4  # orders of a shard in an epoch; a worker needs one at a time, or two with a pipeline


class Shards:
    """The shards of the training examples, whose sizes differ by at most one, and their batches.

    Attributes:
        grid: shape of an epoch: the number of batches in each shard, and of examples in all batches.
        left_out: number of examples that are in no batch of an epoch; 0 without `drop_last`.
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
            num_examples: number of examples in the training part.
            num_shards: number of shards.
            batch_size: number of examples in a mini-batch. The last one of a shard may be shorter.
            seed: seed of the job, not negative.
            shuffle: False keeps the order of the file, both between shards and within them.
            steps: number of mini-batches in a batch, the data of one push. More than one: a worker takes local steps.
            drop_last: True leaves out a shard's last mini-batch in every epoch if it is not full.

        Raises:
            DataError: a shard would be smaller than one mini-batch.
        """
        _check_sizes(num_examples, num_shards, batch_size)
        self._mini_batch_size = batch_size
        self._batch_size = batch_size * steps
        self._seed = seed
        self._shuffle = shuffle
        self._shards = np.array_split(self._shuffled(np.arange(num_examples, dtype=np.int64)), num_shards)
        self._orders: dict[tuple[int, int], NDArray[np.int64]] = {}  # by (epoch, shard), the oldest first
        dropped = [len(shard) % batch_size if drop_last else 0 for shard in self._shards]
        self._sizes = [len(shard) - count for shard, count in zip(self._shards, dropped, strict=True)]
        self.left_out = sum(dropped)
        batches = tuple(-(-size // self._batch_size) for size in self._sizes)
        self.grid = EpochGrid(batches, num_examples - self.left_out, self._batch_size, tuple(self._sizes))

    def rows(self, batch: BatchId) -> NDArray[np.int64]:
        """Return the rows of a batch's examples, read-only: `[batch_size · steps]`, or fewer at the end of a shard."""
        if not 0 <= batch.shard < len(self._shards) or not 0 <= batch.index < self.grid.batches_per_shard[batch.shard]:
            raise IndexError(f"{batch} is outside an epoch with {self.grid.batches_per_shard} batches per shard")
        start = batch.index * self._batch_size
        stop = min(start + self._batch_size, self._sizes[batch.shard])
        return self._order(batch.epoch, batch.shard)[start:stop]

    def mini_batches(self, batch: BatchId) -> list[NDArray[np.int64]]:
        """Return the rows of each mini-batch of a batch, in order. The last mini-batch may be shorter."""
        rows = self.rows(batch)
        size = self._mini_batch_size
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def smallest_mini_batch(self) -> NDArray[np.int64]:
        """Return the rows of the shortest mini-batch of the first epoch. No mini-batch of another epoch is shorter."""
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
        raise DataError("there are no training examples; expected at least one")
    if num_shards > num_examples:
        raise DataError(f"{counted(num_examples, 'example')} cannot fill {num_shards} shards; lower num_shards")
    smallest = num_examples // num_shards
    if batch_size > smallest:
        raise DataError(
            f"batch_size {batch_size} is larger than a shard: {num_examples} examples in "
            f"{counted(num_shards, 'shard')} make shards of {smallest}; lower batch_size or num_shards"
        )
