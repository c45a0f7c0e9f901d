"""The published vector: the weights that workers read, perhaps while a step changes them."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from psgd_workers.messages import FloatArray, Version

__all__ = ["PrivateVector", "Published"]


class Published(Protocol):
    """Interface of a vector that tells its readers when it changes."""

    values: FloatArray  # [partition size]
    counts: NDArray[np.int64]  # [3]: sequence number, incarnation and updates; see `psgd_workers.transport.memory`

    def begin(self) -> None:
        """Announce that the values are about to change."""

    def end(self, version: Version) -> None:
        """Announce that the values changed and belong to `version` now."""


class PrivateVector:
    """A vector in the server's own memory, which only the server reads.

    Args:
        size: number of values.
    """

    def __init__(self, size: int) -> None:
        self.values: FloatArray = np.empty(size, np.float32)
        self.counts = np.zeros(3, np.int64)

    def begin(self) -> None:
        """No-op: this vector has no concurrent readers."""

    def end(self, version: Version) -> None:
        """No-op: this vector has no concurrent readers."""
