"""The applied set: the batches whose gradient a partition's state contains, and the batches that were skipped."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from psgd_workers.messages import BatchId, EpochGrid

__all__ = ["EPOCHS", "MISSING", "ROWS", "AppliedSet", "Bitmap"]

Bitmap = NDArray[np.bool_]

# Indices of `AppliedSet.progress`. The number of batches that the epoch in row r still misses is at MISSING + r.
EPOCHS = 0
MISSING = 1
ROWS = 2  # epochs that may be open: the first one that is not complete, and the next one


class AppliedSet:
    """The number of complete epochs, and for each open epoch a bitmap of its batches in the order of their positions.

    A batch is *settled* once the state contains its gradient or the batch is skipped. An epoch is *complete* once all
    its batches and all batches of earlier epochs are settled. An epoch that is not complete is *open* once one of its
    batches is settled. At most two epochs are open, and epoch e has row e mod 2 of each array.

    Args:
        grid: number of batches in each shard, and of examples in an epoch.
        epochs: number of complete epochs.
        settled: epoch -> bitmap of its settled batches, for each open epoch; copied.
        skipped: epoch -> bitmap of its skipped batches; an epoch without an entry has none; copied.

    Attributes:
        bitmaps: `[2, batches of an epoch]`, bool: the settled batches of the open epochs.
        progress: `[3]`, int64: number of complete epochs, and number of batches that are not settled, for each row.
    """

    def __init__(
        self,
        grid: EpochGrid,
        epochs: int = 0,
        settled: Mapping[int, Bitmap] | None = None,
        skipped: Mapping[int, Bitmap] | None = None,
    ) -> None:
        self._grid = grid
        self.bitmaps: Bitmap = np.zeros((ROWS, grid.num_batches), np.bool_)
        self._skipped: Bitmap = np.zeros_like(self.bitmaps)
        self.progress = np.array([epochs, grid.num_batches, grid.num_batches])
        self._progress = self.progress.data  # read in a third of the time
        for of, bitmaps in ((settled, self.bitmaps), (skipped, self._skipped)):
            for epoch, bitmap in (of or {}).items():
                bitmaps[self._row(epoch)] = bitmap
        for row in range(ROWS):
            self._progress[MISSING + row] = int((~self.bitmaps[row]).sum())

    def _row(self, epoch: int) -> int:
        assert 0 <= epoch - self.epochs < ROWS, f"epoch {epoch} cannot be open after {self.epochs} complete epochs"
        return epoch % ROWS

    @property
    def epochs(self) -> int:
        """Number of complete epochs: every batch of epochs 0 to `epochs` - 1 is settled."""
        return self._progress[EPOCHS]

    def __contains__(self, batch: BatchId) -> bool:
        """Return True if the batch is settled."""
        ahead = batch.epoch - self.epochs
        return ahead < 0 or (ahead < ROWS and bool(self.bitmaps[batch.epoch % ROWS, self._grid.position(batch)]))

    def add(self, batch: BatchId, skip: bool = False) -> None:
        """Mark a batch as contained or as skipped. It must not be settled yet."""
        row = self._row(batch.epoch)
        position = self._grid.position(batch)
        assert not self.bitmaps[row, position], batch
        self.bitmaps[row, position] = True
        if skip:
            self._skipped[row, position] = True
        progress = self._progress
        progress[MISSING + row] -= 1
        while not progress[MISSING + progress[EPOCHS] % ROWS]:
            complete = progress[EPOCHS] % ROWS
            self.bitmaps[complete] = False
            self._skipped[complete] = False
            progress[MISSING + complete] = self._grid.num_batches
            progress[EPOCHS] += 1

    def settled(self) -> dict[int, Bitmap]:
        """Return epoch -> copy of the bitmap of settled batches, for each open epoch."""
        return self._by_epoch(self.bitmaps)

    def skipped(self) -> dict[int, Bitmap]:
        """Return epoch -> copy of the bitmap of skipped batches, for each open epoch that has some."""
        return self._by_epoch(self._skipped)

    def _by_epoch(self, bitmaps: Bitmap) -> dict[int, Bitmap]:
        epochs = range(self.epochs, self.epochs + ROWS)
        return {epoch: bitmaps[epoch % ROWS].copy() for epoch in epochs if bitmaps[epoch % ROWS].any()}

    @property
    def between_epochs(self) -> bool:
        """Return True if no epoch is open."""
        return self._missing == ROWS * self._grid.num_batches

    @property
    def _missing(self) -> int:
        return self._progress[MISSING] + self._progress[MISSING + 1]

    def __len__(self) -> int:
        """Return the number of settled batches over all epochs."""
        return (self.epochs + ROWS) * self._grid.num_batches - self._missing
