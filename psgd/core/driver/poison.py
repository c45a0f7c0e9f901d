"""Poison: batches at which too many attempts failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from psgd.core.driver.events import Skip
from psgd.core.driver.ledger import Ledger
from psgd_workers.messages import BatchId, EpochGrid

__all__ = ["PoisonTracker"]


class PoisonTracker:
    """Counts the failed attempts at each batch.

    When a worker dies, this is a failed attempt at the batch that the worker was computing: the first batch of its
    lease that a server lacks. A gradient that is not finite is a failed attempt as well.

    Args:
        grid: number of batches in each shard.
        tries: number of failed attempts that make a batch poison.

    Attributes:
        poison: batches that count as poison.
    """

    def __init__(self, grid: EpochGrid, tries: int) -> None:
        self._grid = grid
        self._limit = tries
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
            counts: (batch, number of its gradients that were not finite), as one server counted them.
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
        """Withhold the epoch's poison from leases. Return the orders to skip it; a restored server needs them again."""
        poison = sorted(batch for batch in self.poison if batch.epoch == ledger.epoch)
        for batch in poison:
            ledger.withhold(self._grid.position(batch))
        return [Skip(batch) for batch in poison]

    def _judge(self, batch: BatchId) -> bool:
        """Return True if a batch becomes poison now."""
        if batch in self.poison or self.tries(batch) < self._limit:
            return False
        self.poison.add(batch)
        return True
