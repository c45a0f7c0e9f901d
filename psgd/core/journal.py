"""The journal: one fixed-size record per push, join, leave, change and fork, in the server's order."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psgd.spec import Settings
from psgd_workers.messages import Gradient, Outcome, Version

__all__ = ["RECORD", "Journal", "Kind"]

RECORD = np.dtype(
    [
        ("kind", "u1"),  # of Kind
        ("outcome", "u1"),  # index into Outcome; of a push
        ("worker", "S16"),
        ("now", "f8"),  # the server's clock, seconds
        ("epoch", "u4"),
        ("shard", "u4"),
        ("index", "u4"),
        ("examples", "u4"),
        ("read_incarnation", "u4"),
        ("read_updates", "u8"),
        ("incarnation", "u4"),  # the server's version after the record
        ("updates", "u8"),
        ("loss", "f4"),
        ("compute_s", "f4"),
    ]
)

OUTCOMES = {outcome: number for number, outcome in enumerate(Outcome)}


class Kind(IntEnum):
    """What a record tells of."""

    FORK = 0  # a new incarnation; `read_*` is the version it forked from
    JOIN = 1
    LEAVE = 2
    PUSH = 3
    CHANGE = 4  # `index` is the number of the settings, among those of the journal


class Journal:
    """Records since the last `take()`, in an array that doubles as it fills.

    Attributes:
        settings: what each change was to, in order, since the run began: those before a fork are carried over.
    """

    def __init__(self) -> None:
        self.settings: list[Settings] = []
        self._records = np.zeros(256, RECORD)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def fork(self, now: float, origin: Version, version: Version) -> None:
        """A server started or was restored."""
        self._append((Kind.FORK, 0, b"", now, 0, 0, 0, 0, *origin, *version, 0.0, 0.0))

    def member(self, kind: Kind, now: float, worker: str, version: Version) -> None:
        """A worker joined or left."""
        self._append((kind, 0, worker.encode(), now, 0, 0, 0, 0, 0, 0, *version, 0.0, 0.0))

    def change(self, now: float, settings: Settings, version: Version) -> None:
        """The server goes on by other settings."""
        self._append((Kind.CHANGE, 0, b"", now, 0, 0, len(self.settings), 0, 0, 0, *version, 0.0, 0.0))
        self.settings.append(settings)

    def push(self, now: float, gradient: Gradient, outcome: Outcome, version: Version) -> None:
        """A gradient arrived; `outcome` and `version` are those after it."""
        sender = (Kind.PUSH, OUTCOMES[outcome], gradient.worker.encode(), now)
        what = (*gradient.batch, gradient.examples, *gradient.read)
        self._append((*sender, *what, *version, gradient.loss, gradient.compute_s))

    def take(self) -> NDArray[np.void]:
        """The records since the last call."""
        records = self._records[: self._length].copy()
        self._length = 0
        return records

    def _append(self, record: tuple[Any, ...]) -> None:
        if self._length == len(self._records):
            self._records = np.concatenate([self._records, np.zeros_like(self._records)])
        self._records[self._length] = record
        self._length += 1
