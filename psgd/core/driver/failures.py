"""Incidents: what failed in a run, and what it cost."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

__all__ = ["FailureCounts", "WorkerDeath"]

UNCHARGED = {"preempted", "save_failed", "poison"}


class WorkerDeath(NamedTuple):
    """A worker's death with a lease at work."""

    worker: str
    at: float  # seconds, of the host's clock
    suspicious: bool  # whether the batch it was at may be why


class FailureCounts:
    """Counts failures by kind.

    Attributes:
        failures: how many there were of each kind.
        useful: batches that came into the weights, or were done without, over this process.
    """

    def __init__(self) -> None:
        self.failures = Counter[str]()
        self._open: dict[int, WorkerDeath] = {}  # by the lease that was at work
        self._in_hand = 0  # batches that workers died at
        self._done_before = 0
        self.useful = 0

    @property
    def charged(self) -> int:
        """Failures that count against `failure.max_failures`."""
        return sum(count for kind, count in self.failures.items() if kind not in UNCHARGED)

    def count(self, kind: str) -> None:
        self.failures[kind] += 1

    def begin(self, done: int) -> None:
        """Training begins with so many batches done."""
        self._done_before = done

    def progressed(self, done: int) -> None:
        """So many batches are done."""
        self.useful = max(0, done - self._done_before)

    def died(self, lease: int, worker: str, now: float, suspicious: bool) -> None:
        """A worker is gone in the middle of a lease."""
        self._in_hand += 1
        self._open[lease] = WorkerDeath(worker, now, suspicious)

    def settled(self, lease: int) -> WorkerDeath | None:
        """What became of a lease's batches is known; the incident that ended it, if one did."""
        return self._open.pop(lease, None)

    def goodput(self, pushes: int) -> float | None:
        """Useful batches over computed ones.

        Args:
            pushes: that servers heard of.
        """
        computed = pushes + self._in_hand
        return min(1.0, self.useful / computed) if computed else None
