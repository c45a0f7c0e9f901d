"""What a server tells the driver: its version, what its state contains, and what it counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from psgd.core.server.applied import Bitmap
from psgd_workers.messages import BatchId, EpochGrid, Version

__all__ = ["EpochLoss", "Mark", "Report", "staleness_summary"]


class Mark(NamedTuple):
    """How far a server was at one instant of its clock."""

    now: float  # seconds
    updates: int
    samples: int


class EpochLoss(NamedTuple):
    """Training loss summed over the examples of one epoch applied so far."""

    total: float
    examples: int

    @property
    def mean(self) -> float:
        return self.total / self.examples


@dataclass(frozen=True, slots=True)
class Report:
    """One partition at one instant; arrays are copies."""

    partition: int
    version: Version
    epochs: int  # complete: every batch of the epochs before this one is in the state, or skipped
    settled: Mapping[int, Bitmap]  # over positions, of the epochs that are open: contained or skipped
    pushes: Mapping[str, int]  # by outcome, over the whole run; buffered: now
    staleness: Mapping[int, int]  # staleness -> applied gradients
    losses: Mapping[int, EpochLoss]  # of the newest epochs
    samples: int  # examples applied
    heard: Mapping[str, int]  # live worker -> its pushes, whatever became of them
    parked: frozenset[str]  # workers whose receipt is not yet given
    bytes_pushed: int  # of the vectors of all pushes
    first: Mark | None  # this incarnation's first step
    last: Mark | None  # ... and newest
    longest_s: float  # that a batch has taken to compute, since this server started
    rejected: Mapping[BatchId, int]  # batches of open epochs -> how often their gradient was not finite

    @property
    def moment(self) -> tuple[int, ...]:
        """Never less than that of an earlier report of the partition: answers may overtake each other on their way."""
        settled = sum(int(bitmap.sum()) for bitmap in self.settled.values())
        return self.version.incarnation, sum(self.pushes.values()), self.version.updates, self.epochs, settled

    def contained(self, grid: EpochGrid) -> int:
        """Batches settled, over the whole run."""
        return self.epochs * grid.num_batches + sum(int(bitmap.sum()) for bitmap in self.settled.values())

    def rate(self, count: str) -> float | None:
        """Updates or samples per second from the first step to the newest, the first left out."""
        if self.first is None or self.last is None or self.last.now <= self.first.now:
            return None
        made: int = getattr(self.last, count) - getattr(self.first, count)
        return made / (self.last.now - self.first.now)


def staleness_summary(histogram: Mapping[int, int]) -> dict[str, float | None]:
    """Mean, median, 95th percentile and maximum of a staleness histogram; percentiles are observed values."""
    total = sum(histogram.values())
    if total == 0:
        return {"mean": None, "p50": None, "p95": None, "max": None}
    mean = sum(value * count for value, count in histogram.items()) / total
    return {
        "mean": mean,
        "p50": _percentile(histogram, 0.50 * total),
        "p95": _percentile(histogram, 0.95 * total),
        "max": float(max(histogram)),
    }


def _percentile(histogram: Mapping[int, int], rank: float) -> float:
    seen = 0
    for value in sorted(histogram):
        seen += histogram[value]
        if seen >= rank:
            return float(value)
    raise AssertionError("a rank within the total is reached")
