"""The applied set: which batches a partition's state contains."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from psgd_workers.messages import BatchId, EpochGrid

__all__ = ["AppliedSet", "Bitmap"]

Bitmap = NDArray[np.bool_]


class AppliedSet:
    """A number of complete epochs, and a bitmap over positions for each open one.

    Args:
        grid: the shape of an epoch.
        epochs: every batch of the epochs before this one is contained.
        bitmaps: of open epochs, copied.
    """

    def __init__(self, grid: EpochGrid, epochs: int = 0, bitmaps: Mapping[int, Bitmap] | None = None) -> None:
        self._grid = grid
        self.epochs = epochs
        self._bitmaps = {epoch: bitmap.copy() for epoch, bitmap in (bitmaps or {}).items()}
        self._missing = {epoch: int((~bitmap).sum()) for epoch, bitmap in self._bitmaps.items()}

    def __contains__(self, batch: BatchId) -> bool:
        if batch.epoch < self.epochs:
            return True
        bitmap = self._bitmaps.get(batch.epoch)
        return bitmap is not None and bool(bitmap[self._grid.position(batch)])

    def add(self, batch: BatchId) -> None:
        """Add a batch that is not contained yet."""
        assert batch not in self, batch
        if batch.epoch not in self._bitmaps:
            self._bitmaps[batch.epoch] = np.zeros(self._grid.num_batches, np.bool_)
            self._missing[batch.epoch] = self._grid.num_batches
        self._bitmaps[batch.epoch][self._grid.position(batch)] = True
        self._missing[batch.epoch] -= 1
        while self._missing.get(self.epochs) == 0:
            del self._bitmaps[self.epochs], self._missing[self.epochs]
            self.epochs += 1

    def bitmaps(self) -> dict[int, Bitmap]:
        """Copies of the bitmaps of the open epochs."""
        return {epoch: bitmap.copy() for epoch, bitmap in self._bitmaps.items()}

    @property
    def between_epochs(self) -> bool:
        """Whether no epoch is open: the complete ones are all there is."""
        return not self._bitmaps

    def __len__(self) -> int:
        open_ones = self._grid.num_batches * len(self._missing) - sum(self._missing.values())
        return self.epochs * self._grid.num_batches + open_ones
