"""The journal: one fixed-size record per push, join, leave, change and fork, in the server's order."""

from __future__ import annotations

from enum import IntEnum
from math import copysign, inf
from struct import Struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psgd.spec import Settings
from psgd_workers.messages import BatchId, Gradient, Outcome, Version

__all__ = ["RECORD", "Journal", "RecordKind"]

RECORD = np.dtype(
    [
        ("kind", "u1"),  # of Kind
        ("outcome", "u1"),  # index into Outcome; of a push
        ("worker", "S16"),
        ("now", "<f8"),  # the server's clock, seconds
        ("epoch", "<u4"),
        ("shard", "<u4"),
        ("index", "<u4"),
        ("examples", "<u4"),
        ("read_incarnation", "<u4"),
        ("read_updates", "<u8"),
        ("incarnation", "<u4"),  # the server's version after the record
        ("updates", "<u8"),
        ("loss", "<f4"),
        ("compute_s", "<f4"),
    ]
)

LAYOUT = Struct("<BB16sdIIIIIQIQff")  # of a record, which is written much faster so than through NumPy
assert LAYOUT.size == RECORD.itemsize
OUTCOMES = {outcome: number for number, outcome in enumerate(Outcome)}


class RecordKind(IntEnum):
    """What a record tells of."""

    FORK = 0  # a new incarnation; `read_*` is the version it forked from
    JOIN = 1
    LEAVE = 2
    PUSH = 3
    CHANGE = 4  # `index` is the number of the settings, among those of the journal
    SKIP = 5  # a batch that the partition does without


class Journal:
    """Records since the last `take()`, in memory that doubles as it fills.

    Attributes:
        settings: what each change was to, in order, since the run began: those before a fork are carried over.
    """

    def __init__(self) -> None:
        self.settings: list[Settings] = []
        self._records = bytearray(256 * RECORD.itemsize)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def fork(self, now: float, origin: Version, version: Version) -> None:
        """A server started or was restored."""
        self._append((RecordKind.FORK, 0, b"", now, 0, 0, 0, 0, *origin, *version, 0.0, 0.0))

    def member(self, kind: RecordKind, now: float, worker: str, version: Version) -> None:
        """A worker joined or left."""
        self._append((kind, 0, worker.encode(), now, 0, 0, 0, 0, 0, 0, *version, 0.0, 0.0))

    def change(self, now: float, settings: Settings, version: Version) -> None:
        """The server goes on by other settings."""
        self._append((RecordKind.CHANGE, 0, b"", now, 0, 0, len(self.settings), 0, 0, 0, *version, 0.0, 0.0))
        self.settings.append(settings)

    def skip(self, now: float, batch: BatchId, examples: int, version: Version) -> None:
        """The partition does without a batch."""
        self._append((RecordKind.SKIP, 0, b"", now, *batch, examples, 0, 0, *version, 0.0, 0.0))

    def push(self, now: float, gradient: Gradient, outcome: Outcome, version: Version) -> None:
        """A gradient arrived; `outcome` and `version` are those after it."""
        worker, batch, examples, read, _, loss, _, compute_s, _, _ = gradient
        code = OUTCOMES[outcome]
        name = worker.encode()
        self._append((RecordKind.PUSH, code, name, now, *batch, examples, *read, *version, loss, compute_s))

    def take(self) -> NDArray[np.void]:
        """The records since the last call."""
        records = np.frombuffer(self._records, RECORD, self._length).copy()
        self._length = 0
        return records

    def _append(self, record: tuple[Any, ...]) -> None:
        offset = self._length * RECORD.itemsize
        if offset == len(self._records):
            self._records = self._records + bytes(len(self._records))
        try:
            LAYOUT.pack_into(self._records, offset, *record)
        except OverflowError:  # a loss too large for four bytes: a diverged one is infinite there
            *others, loss, compute_s = record
            LAYOUT.pack_into(self._records, offset, *others, copysign(inf, loss), compute_s)
        self._length += 1
