"""ServerState: what a checkpoint holds of a server, and a new one is restored from; and how large it may become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from numpy.typing import NDArray

__all__ = ["ServerState", "Vectors"]


class Vectors(NamedTuple):
    """A number of float32 vectors, each as long as the partition's slice of the weights."""

    held: int  # in memory, at most
    saved: int = 0  # of these, the ones that a state contains


@dataclass(frozen=True, slots=True)
class ServerState:
    """A partition's whole state. Arrays are copies.

    Attributes:
        arrays: by name: `weights`, `average`, `settled.EPOCH`, `skipped.EPOCH`, and `optimizer.NAME`,
            `aggregator.NAME`, `correction.NAME`.
        facts: plain JSON values.
    """

    arrays: Mapping[str, NDArray[Any]]
    metadata: Mapping[str, Any]

    def part(self, name: str) -> dict[str, NDArray[Any]]:
        """The arrays whose names begin with `name.`, without that."""
        return {key.partition(".")[2]: array for key, array in self.arrays.items() if key.startswith(f"{name}.")}
