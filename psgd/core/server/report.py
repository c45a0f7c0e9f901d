"""A server's report to the driver: its version, the batches that its state contains, and its counters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from psgd.core.server.applied import Bitmap
from psgd_workers.messages import BatchId, EpochGrid, Version

__all__ = ["EpochLoss", "Mark", "Report", "staleness_summary"]


class Mark(NamedTuple):
    """A server's progress at one instant of its clock."""

    now: float  # seconds
    updates: int
    samples: int


class EpochLoss(NamedTuple):
    """Training loss, summed over the examples of one epoch that were applied so far."""

    total: float
    examples: int

    @property
    def mean(self) -> float:
        """Return the loss per example."""
        return self.total / self.examples


@dataclass(frozen=True, slots=True)
class Report:
    """The state of one partition at one instant. Arrays are copies."""

    partition: int
    version: Version
    epochs: int  # number of complete epochs: every batch of epochs 0 to `epochs` - 1 is contained or skipped
    settled: Mapping[int, Bitmap]  # open epoch -> bitmap over positions: contained or skipped
    pushes: Mapping[str, int]  # outcome -> pushes over the whole run, but `buffered` -> pushes that wait now
    staleness: Mapping[int, int]  # staleness -> number of applied gradients
    losses: Mapping[int, EpochLoss]  # epoch -> loss, for the newest epochs
    samples: int  # examples applied
    worker_pushes: Mapping[str, int]  # worker that has joined -> number of its pushes since it joined, of any outcome
    parked: frozenset[str]  # workers whose receipt is held back
    bytes_pushed: int  # bytes of the vectors of all pushes
    first: Mark | None  # progress at the first step of this incarnation
    last: Mark | None  # progress at its newest step
    longest_s: float  # longest computing time of a batch since this server started, seconds
    rejected: Mapping[BatchId, int]  # batch of an open epoch -> number of its gradients that were not finite
    compiled: float | None = None  # share of the pushes since this server started that compiled code took

    @property
    def moment(self) -> tuple[int, ...]:
        """Return a sort key. Of two reports of a partition, the newer one has the larger key.

        The driver needs it because reports may arrive in another order than they were made.
        """
        return self.version.incarnation, self.num_pushes, self.version.updates, self.epochs, self._num_settled

    @property
    def num_pushes(self) -> int:
        """Return the number of pushes over the whole run."""
        return sum(self.pushes.values())

    @property
    def _num_settled(self) -> int:
        return sum(int(np.count_nonzero(bitmap)) for bitmap in self.settled.values())

    def contained(self, grid: EpochGrid) -> int:
        """Return the number of settled batches over the whole run."""
        return self.epochs * grid.num_batches + self._num_settled

    def rate(self, count: str) -> float | None:
        """Return updates or samples per second from the first step to the newest one; None before a second step.

        Args:
            count: `updates` or `samples`.
        """
        if self.first is None or self.last is None or self.last.now <= self.first.now:
            return None
        made: int = getattr(self.last, count) - getattr(self.first, count)
        return made / (self.last.now - self.first.now)


def staleness_summary(histogram: Mapping[int, int]) -> dict[str, float | None]:
    """Return mean, median, 95th percentile and maximum of a staleness histogram.

    The median and the percentile are values that occurred, not interpolated ones.
    """
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
    raise AssertionError(f"rank {rank} is above the total count {seen} of the histogram")
