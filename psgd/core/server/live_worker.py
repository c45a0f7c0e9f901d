"""LiveWorker: what one server knows about a worker that has joined."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["BATCHES", "CLOCK", "LAST_PUSH_AT", "LIVE", "MEAN_S", "PUSHES", "TOTAL_S", "LiveWorker"]

LIVE, CLOCK, PUSHES, BATCHES = range(4)  # indices of `LiveWorker.counts`
LAST_PUSH_AT, TOTAL_S, MEAN_S = range(3)  # indices of `LiveWorker.times`


class LiveWorker:
    """The numbers of one worker that has joined, and has not left.

    Args:
        clock: initial clock of the worker.
        now: time of the server's clock, seconds.

    Attributes:
        counts: `[4]`, int64: 1 until the worker leaves; its clock; its number of pushes since it joined, of any
            outcome; and its number of batches whose computing times were added up.
        times: `[3]`, float64, seconds: time of its last push, or of its join; sum of the computing times of its
            batches; and their mean.
    """

    __slots__ = ("_counts", "_times", "counts", "times")

    def __init__(self, clock: int = 0, now: float = 0.0) -> None:
        self.counts = np.array([1, clock, 0, 0])
        self.times = np.array([now, 0.0, 0.0])
        self._counts = self.counts.data  # Python reads and writes these in a third of the time
        self._times: memoryview[Any] = self.times.data

    @property
    def clock(self) -> int:
        """Number of pushes of the worker, made equal for all workers at an epoch's end."""
        return self._counts[CLOCK]

    @clock.setter
    def clock(self, clock: int) -> None:
        self._counts[CLOCK] = clock

    @property
    def pushes(self) -> int:
        """Number of pushes since the worker joined, of any outcome."""
        return self._counts[PUSHES]

    def pushed(self, now: float) -> float:
        """Count a push. Return the seconds since the last one, or since the worker joined."""
        since_s: float = now - self._times[LAST_PUSH_AT]
        self._times[LAST_PUSH_AT] = now
        self._counts[PUSHES] += 1
        return since_s

    def computed(self, seconds: float) -> tuple[float, float]:
        """Add the computing time of a batch. Return the mean time of the worker's batches before and after it."""
        counts = self._counts
        times = self._times
        before: float = times[MEAN_S]
        counts[BATCHES] += 1
        times[TOTAL_S] += seconds
        times[MEAN_S] = times[TOTAL_S] / counts[BATCHES]
        return before, times[MEAN_S]

    @property
    def batches(self) -> int:
        """Number of batches whose computing times were added up."""
        return self._counts[BATCHES]

    @property
    def mean_s(self) -> float:
        """Mean computing time of the worker's batches, seconds."""
        return float(self._times[MEAN_S])

    def leave(self) -> None:
        """Mark the worker as one that has no lease any more."""
        self._counts[LIVE] = 0
