"""How far a run is on its way to the job's limits, and how long the rest will take."""

from __future__ import annotations

from collections import deque

from psgd.core.driver.status import RunStatus
from psgd.spec import RunConfig

__all__ = ["Pace"]

WINDOW_S = 30.0  # longer: steadier estimates, which notice later that workers came or went
LEAST_S = 2.0  # of training, before which nothing is estimated


class Pace:
    """Estimates from the statuses of the last half a minute.

    Args:
        limits: of the job; the one that is nearest counts. A target may end the run before them.
    """

    def __init__(self, limits: RunConfig) -> None:
        self._limits = limits
        self._seen = deque[tuple[float, float]]()  # (time, share done)

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
        """Note how far the run is."""
        share = self.share(status)
        if status.phase != "training":
            return
        if self._seen and share < self._seen[-1][1]:  # a server was restored to an earlier state
            self._seen.clear()
        self._seen.append((status.now, share))
        while status.now - self._seen[0][0] > WINDOW_S:
            self._seen.popleft()

    def left_s(self) -> float | None:
        """Return the seconds that the rest will take; None while that cannot be told."""
        if not self._seen:
            return None
        began, before = self._seen[0]
        now, share = self._seen[-1]
        if now - began < LEAST_S or share <= before or share >= 1.0:
            return None
        return (1.0 - share) * (now - began) / (share - before)
