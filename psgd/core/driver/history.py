"""The epochs that became complete in this process, and their training losses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from psgd.core.server.report import Report

__all__ = ["History"]

RECENT = 256  # epochs that are kept: many more than can become complete between two readings of the status


class History:
    """Losses of the newest complete epochs.

    A partition that was restored may contain fewer epochs than before. The epochs that it lacks are dropped, and noted
    again once they are complete again.
    """

    def __init__(self) -> None:
        self._epochs = 0  # number of complete epochs
        self._losses: dict[int, float | None] = {}

    def __iter__(self) -> Iterator[tuple[int, float | None]]:
        """Yield (epoch from 1, mean training loss), oldest first."""
        return iter(self._losses.items())

    def begin(self, epochs: int) -> None:
        """Start with `epochs` complete epochs, which an earlier process trained."""
        self._epochs = epochs

    def advance(self, epochs: int, reports: Iterable[Report]) -> None:
        """Note the number of epochs that are complete now.

        Args:
            epochs: number of complete epochs in every partition.
            reports: newest report of each partition.
        """
        for epoch in range(epochs, self._epochs):
            self._losses.pop(epoch + 1, None)
        for epoch in range(self._epochs, epochs):
            losses = [report.losses[epoch].mean for report in reports if epoch in report.losses]
            self._losses[epoch + 1] = losses[0] if losses else None
        self._epochs = epochs
        while len(self._losses) > RECENT:
            del self._losses[next(iter(self._losses))]
