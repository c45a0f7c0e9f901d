"""The saved state of one server, and the unit in which its memory is counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from numpy.typing import NDArray

from psgd.core.server.applied import Bitmap
from psgd.core.server.partitions import Partition
from psgd.spec import Settings
from psgd_workers.messages import Version

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

    @property
    def version(self) -> Version:
        """Version of the weights."""
        return Version(*self.metadata["version"])

    @property
    def history(self) -> list[tuple[int, int]]:
        """Incarnations that the weights come from, and the number of updates at which each began; oldest first."""
        return [(incarnation, began) for incarnation, began in self.metadata["history"]]

    @property
    def partition(self) -> Partition:
        """Slice of the weights that the state belongs to."""
        return Partition(*self.metadata["partition"])

    @property
    def epochs(self) -> int:
        """Number of complete epochs."""
        epochs: int = self.metadata["epochs"]
        return epochs

    @property
    def settings(self) -> Settings:
        """Settings that were in force."""
        return Settings.model_validate(self.metadata["settings"])

    @property
    def changes(self) -> list[Settings]:
        """Settings of every change since the run began, in order."""
        return [Settings.model_validate(settings) for settings in self.metadata["changes"]]

    def bitmaps(self, name: str) -> dict[int, Bitmap]:
        """Return epoch -> bitmap of its batches.

        Args:
            name: `settled` or `skipped`.
        """
        return {int(epoch): bitmap for epoch, bitmap in self.part(name).items()}

    def part(self, name: str) -> dict[str, NDArray[Any]]:
        """Return the arrays of one component. The prefix is removed: `optimizer.mean` becomes `mean`.

        Args:
            name: prefix of the array names, such as `optimizer`.
        """
        return {key.partition(".")[2]: array for key, array in self.arrays.items() if key.startswith(f"{name}.")}
