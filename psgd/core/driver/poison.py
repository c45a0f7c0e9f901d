"""Batches that may kill their workers, and those that count as poison."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from psgd.core.driver.events import Skip
from psgd.core.driver.ledger import Ledger
from psgd_workers.messages import BatchId, EpochGrid

__all__ = ["PoisonTracker"]


class PoisonTracker:
    """Counts the failed attempts at each batch.

    When a worker dies, the first batch of its lease that a server lacks counts as the one that it was computing. A
    gradient that is not finite counts as a failed attempt as well.

    Args:
        grid: number of batches by shard.
        tries: number of failed attempts that make a batch poison.
    """

    def __init__(self, grid: EpochGrid, tries: int) -> None:
        self._grid = grid
        self._tries = tries
        self._deaths = Counter[BatchId]()
        self._rejected: Counter[BatchId] = Counter()
        self.poison: set[BatchId] = set()

    def died(self, batch: BatchId) -> bool:
        """Count the death of a worker at `batch`. Return True if that makes the batch poison."""
        self._deaths[batch] += 1
        return self._judge(batch)

    def rejected(self, counts: Iterable[tuple[BatchId, int]]) -> list[BatchId]:
        """Update the counts of gradients that were not finite. Return the batches that became poison.

        Args:
            counts: (batch, count) of one server.
        """
        found = []
        for batch, count in counts:
            self._rejected[batch] = max(self._rejected[batch], count)
            if self._judge(batch):
                found.append(batch)
        return found

    def tries(self, batch: BatchId) -> int:
        """Return the number of failed attempts at a batch."""
        return self._deaths[batch] + self._rejected[batch]

    def skips(self, ledger: Ledger) -> list[Skip]:
        """Withhold the epoch's poison from leases. Return orders to skip it, which a restored server needs again."""
        poison = sorted(batch for batch in self.poison if batch.epoch == ledger.epoch)
        for batch in poison:
            ledger.withhold(self._grid.position(batch))
        return [Skip(batch) for batch in poison]

    def _judge(self, batch: BatchId) -> bool:
        """Return True if a batch becomes poison now."""
        if batch in self.poison or self.tries(batch) < self._tries:
            return False
        self.poison.add(batch)
        return True
