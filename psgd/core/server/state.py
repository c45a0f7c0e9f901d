"""The saved state of one server, and the unit in which its memory is counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from numpy.typing import NDArray

__all__ = ["ServerState", "VectorCounts"]


class VectorCounts(NamedTuple):
    """A number of float32 vectors, each as long as the partition's slice of the weights."""

    held: int  # largest number of vectors in memory at the same time
    saved: int = 0  # number of these vectors that a state contains


@dataclass(frozen=True, slots=True)
class ServerState:
    """The whole state of one partition. Arrays are copies.

    Attributes:
        arrays: array by name: `weights`, `average`, `settled.EPOCH`, `skipped.EPOCH`, `optimizer.NAME`,
            `aggregator.NAME` and `correction.NAME`.
        metadata: JSON value by name: version, history, partition, settings and counters.
    """

    arrays: Mapping[str, NDArray[Any]]
    metadata: Mapping[str, Any]

    def part(self, name: str) -> dict[str, NDArray[Any]]:
        """Return the arrays of one component. The prefix is removed: `optimizer.mean` becomes `mean`.

        Args:
            name: prefix of the array names, such as `optimizer`.
        """
        return {key.partition(".")[2]: array for key, array in self.arrays.items() if key.startswith(f"{name}.")}
