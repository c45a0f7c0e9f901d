"""Counts of a run's failures by kind, and of the batches that they wasted."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

__all__ = ["FailureCounts", "WorkerDeath"]

UNCHARGED = {"preempted", "save_failed", "poison"}  # kinds that do not count against `failure.max_failures`


class WorkerDeath(NamedTuple):
    """The death of a worker that was working on a lease."""

    worker: str
    at: float  # seconds, on the host's clock
    suspicious: bool  # True if its current batch may be the cause


class FailureCounts:
    """Counts failures by kind.

    Attributes:
        failures: kind -> number of failures.
        useful: number of batches that this process brought into the weights or skipped.
    """

    def __init__(self) -> None:
        self.failures = Counter[str]()
        self._deaths: dict[int, WorkerDeath] = {}  # lease that is not settled -> death of the worker that worked on it
        self._batches_cut_off = 0  # batches that workers were computing when they died
        self._done_before = 0
        self.useful = 0

    @property
    def charged(self) -> int:
        """Return the number of failures that count against `failure.max_failures`."""
        return sum(count for kind, count in self.failures.items() if kind not in UNCHARGED)

    def count(self, kind: str) -> None:
        """Count a failure."""
        self.failures[kind] += 1

    def begin(self, done: int) -> None:
        """Start counting: training begins with `done` batches in the weights."""
        self._done_before = done

    def progressed(self, done: int) -> None:
        """Note that `done` batches are in the weights or skipped now."""
        self.useful = max(0, done - self._done_before)

    def died(self, lease: int, worker: str, now: float, suspicious: bool) -> None:
        """Note that a worker died while it was working on a lease.

        Args:
            lease: id of the lease.
            worker: name of the worker.
            now: time of the host's clock, in seconds.
            suspicious: True if its current batch may be the cause.
        """
        self._batches_cut_off += 1
        self._deaths[lease] = WorkerDeath(worker, now, suspicious)

    def settled(self, lease: int) -> WorkerDeath | None:
        """Forget a settled lease. Return the death of the worker that ended it; None if no death ended it."""
        return self._deaths.pop(lease, None)

    def goodput(self, pushes: int) -> float | None:
        """Return the share of computed batches that were applied or skipped; None if none was computed.

        Args:
            pushes: number of pushes that reached the servers.
        """
        computed = pushes + self._batches_cut_off
        return min(1.0, self.useful / computed) if computed else None
