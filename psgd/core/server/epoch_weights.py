"""EpochWeights: copies of the weights at the ends of the newest epochs, which are evaluated while training goes on."""

from __future__ import annotations

from collections.abc import Callable

from psgd.errors import WeightsNotKeptError
from psgd_workers.counting import counted
from psgd_workers.messages import FloatArray

__all__ = ["KEPT_EPOCHS", "EpochWeights"]

KEPT_EPOCHS = 2  # the newest complete epoch, and the one before, which may be under evaluation


class EpochWeights:
    """The weights of one partition at the end of each of the `KEPT_EPOCHS` newest complete epochs.

    Args:
        epochs: number of complete epochs whose weights cannot be kept any more.

    Attributes:
        newest: number of complete epochs at the newest copy; before a copy, the argument `epochs`.
    """

    def __init__(self, epochs: int = 0) -> None:
        self.newest = epochs
        self._kept: dict[int, FloatArray] = {}  # number of complete epochs -> weights at that moment

    def keep(self, epochs: int, copy: Callable[[], FloatArray]) -> None:
        """Keep the weights at the end of an epoch, and drop those of the oldest one if there are too many.

        Args:
            epochs: number of complete epochs now.
            copy: function that returns a copy of the weights, `[partition size]`.
        """
        self.newest = epochs
        for old in sorted(self._kept)[: 1 - KEPT_EPOCHS or None]:  # first, so that there is never one copy more
            del self._kept[old]
        self._kept[epochs] = copy()

    def at(self, epochs: int) -> FloatArray:
        """Return a copy of the weights at the end of an epoch.

        Args:
            epochs: number of complete epochs at that moment.

        Raises:
            WeightsNotKeptError: the end of that epoch is not one of the newest, or was before this server began.
        """
        if epochs not in self._kept:
            kept = ", ".join(map(str, sorted(self._kept))) or "none"
            raise WeightsNotKeptError(
                f"the weights after {counted(epochs, 'epoch')} are not kept; epochs kept: {kept} (a server keeps "
                f"those of the {KEPT_EPOCHS} newest epochs that it completed)"
            )
        return self._kept[epochs].copy()
