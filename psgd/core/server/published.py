"""The published vector: the weights that workers are shown, which they may be reading while a step is made."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from psgd_workers.messages import FloatArray, Version

__all__ = ["PrivateVector", "Published"]


class Published(Protocol):
    """Values of which a reader must know whether they changed meanwhile."""

    values: FloatArray  # [partition size]

    def begin(self) -> None:
        """The values are about to change."""

    def end(self, version: Version) -> None:
        """They have changed, and are of that version now."""


class PrivateVector:
    """Values that nobody reads but through their owner.

    Args:
        size: how many.
    """

    def __init__(self, size: int) -> None:
        self.values: FloatArray = np.empty(size, np.float32)

    def begin(self) -> None:
        """Nobody is looking."""

    def end(self, version: Version) -> None:
        """Nobody has been looking."""
