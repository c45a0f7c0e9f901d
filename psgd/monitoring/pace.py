"""An estimate of the share of a run that is done, and of the time that the rest will take."""

from __future__ import annotations

from collections import deque

from psgd.core.driver.status import RunStatus
from psgd.spec import RunConfig

__all__ = ["Pace"]

WINDOW_S = 30.0  # seconds; longer: steadier estimates, slower to notice that workers joined or left
LEAST_S = 2.0  # seconds of training before the first estimate


class Pace:
    """Estimates progress from the statuses of the last `WINDOW_S` seconds.

    Args:
        limits: limits of the run. The one that will be reached first counts; a target may end the run even earlier.
    """

    def __init__(self, limits: RunConfig) -> None:
        self._limits = limits
        self._seen = deque[tuple[float, float]]()  # (time in seconds, share done), oldest first

    def share(self, status: RunStatus) -> float:
        """Return the share of the run that is done, from 0 to 1."""
        limits = self._limits
        shares = []
        if limits.epochs is not None:
            shares.append((status.epochs + status.batches / status.num_batches) / limits.epochs)
        if limits.max_updates is not None:
            shares.append(status.updates / limits.max_updates)
        if limits.max_time_s is not None:
            shares.append(status.elapsed_s / limits.max_time_s)
        return min(1.0, max(shares))  # a job has at least one limit

    def see(self, status: RunStatus) -> None:
        """Record the progress of the run."""
        share = self.share(status)
        if status.phase != "training":
            return
        if self._seen and share < self._seen[-1][1]:  # a server was restored to an earlier state
            self._seen.clear()
        self._seen.append((status.now, share))
        while status.now - self._seen[0][0] > WINDOW_S:
            self._seen.popleft()

    def left_s(self) -> float | None:
        """Return the estimated seconds until the end; None if there is no estimate yet."""
        if not self._seen:
            return None
        began, before = self._seen[0]
        now, share = self._seen[-1]
        if now - began < LEAST_S or share <= before or share >= 1.0:
            return None
        return (1.0 - share) * (now - began) / (share - before)
