"""Suspects: batches that may be what kills workers, and those that were given up as poison."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from psgd.core.driver.events import Skip
from psgd.core.driver.ledger import Ledger
from psgd_workers.messages import BatchId, EpochGrid

__all__ = ["PoisonTracker"]


class PoisonTracker:
    """Counts tries.

    A worker that dies leaves a lease; the first batch of it that no server contains is what it was at. A gradient that
    is not finite is a try as well.

    Args:
        grid: the shape of an epoch.
        tries: after so many a batch is poison.
    """

    def __init__(self, grid: EpochGrid, tries: int) -> None:
        self._grid = grid
        self._tries = tries
        self._deaths = Counter[BatchId]()
        self._rejected: Counter[BatchId] = Counter()
        self.poison: set[BatchId] = set()

    def died(self, batch: BatchId) -> bool:
        """A worker died at it; whether it is poison now, for the first time."""
        self._deaths[batch] += 1
        return self._judge(batch)

    def rejected(self, counts: Iterable[tuple[BatchId, int]]) -> list[BatchId]:
        """How often each batch's gradient was not finite, as a server counts; those that are poison now."""
        found = []
        for batch, count in counts:
            self._rejected[batch] = max(self._rejected[batch], count)
            if self._judge(batch):
                found.append(batch)
        return found

    def tries(self, batch: BatchId) -> int:
        return self._deaths[batch] + self._rejected[batch]

    def skips(self, ledger: Ledger) -> list[Skip]:
        """Every partition is to do without the poison of the epoch; one that was restored may not know it yet."""
        poison = sorted(batch for batch in self.poison if batch.epoch == ledger.epoch)
        for batch in poison:
            ledger.withhold(self._grid.position(batch))
        return [Skip(batch) for batch in poison]

    def _judge(self, batch: BatchId) -> bool:
        if batch in self.poison or self.tries(batch) < self._tries:
            return False
        self.poison.add(batch)
        return True
