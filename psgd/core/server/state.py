"""ServerState: what a checkpoint holds of a server, and a new one is restored from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

__all__ = ["ServerState"]


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
