"""The applied set: the batches whose gradient a partition's state contains, and the batches that were skipped."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from psgd_workers.messages import BatchId, EpochGrid

__all__ = ["AppliedSet", "Bitmap"]

Bitmap = NDArray[np.bool_]


class AppliedSet:
    """The number of complete epochs, and for each open epoch a bitmap of its batches in the order of their positions.

    A batch is *settled* once the state contains its gradient or the batch is skipped. An epoch is *complete* once all
    its batches and all batches of earlier epochs are settled. An epoch that is not complete is *open* once one of its
    batches is settled.

    Args:
        grid: number of batches in each shard, and of examples in an epoch.
        epochs: number of complete epochs.
        settled: epoch -> bitmap of its settled batches, for each open epoch; copied.
        skipped: epoch -> bitmap of its skipped batches; an epoch without an entry has none; copied.

    Attributes:
        epochs: number of complete epochs: every batch of epochs 0 to `epochs` - 1 is settled.
    """

    def __init__(
        self,
        grid: EpochGrid,
        epochs: int = 0,
        settled: Mapping[int, Bitmap] | None = None,
        skipped: Mapping[int, Bitmap] | None = None,
    ) -> None:
        self._grid = grid
        self.epochs = epochs
        self._settled = {epoch: bitmap.copy() for epoch, bitmap in (settled or {}).items()}
        self._skipped = {epoch: bitmap.copy() for epoch, bitmap in (skipped or {}).items()}
        self._missing = {epoch: int((~bitmap).sum()) for epoch, bitmap in self._settled.items()}

    def __contains__(self, batch: BatchId) -> bool:
        """Return True if the batch is settled."""
        if batch.epoch < self.epochs:
            return True
        bitmap = self._settled.get(batch.epoch)
        return bitmap is not None and bool(bitmap[self._grid.position(batch)])

    def add(self, batch: BatchId, skip: bool = False) -> None:
        """Mark a batch as contained or as skipped. It must not be settled yet."""
        epoch = batch.epoch
        position = self._grid.position(batch)
        settled = self._settled.get(epoch)
        if settled is None:
            assert epoch >= self.epochs, batch
            settled = self._settled[epoch] = np.zeros(self._grid.num_batches, np.bool_)
            self._missing[epoch] = self._grid.num_batches
        assert not settled[position], batch
        settled[position] = True
        if skip:
            skipped = self._skipped.setdefault(epoch, np.zeros(self._grid.num_batches, np.bool_))
            skipped[position] = True
        self._missing[epoch] = missing = self._missing[epoch] - 1
        while not missing and self._missing.get(self.epochs) == 0:
            del self._settled[self.epochs], self._missing[self.epochs]
            self._skipped.pop(self.epochs, None)
            self.epochs += 1

    def settled(self) -> dict[int, Bitmap]:
        """Return epoch -> copy of the bitmap of settled batches, for each open epoch."""
        return {epoch: bitmap.copy() for epoch, bitmap in self._settled.items()}

    def skipped(self) -> dict[int, Bitmap]:
        """Return epoch -> copy of the bitmap of skipped batches, for each open epoch that has some."""
        return {epoch: bitmap.copy() for epoch, bitmap in self._skipped.items()}

    @property
    def between_epochs(self) -> bool:
        """Return True if no epoch is open."""
        return not self._settled

    def __len__(self) -> int:
        """Return the number of settled batches over all epochs."""
        in_open_epochs = self._grid.num_batches * len(self._missing) - sum(self._missing.values())
        return self.epochs * self._grid.num_batches + in_open_epochs
