"""The journal: one fixed-size record per push, join, leave, change, skip and fork, in the server's order.

A push is recorded with its name (worker, slot, number) and with every partition's version that it was computed from, so
that a replay computes the same gradient again.
"""

from __future__ import annotations

from enum import IntEnum
from itertools import chain
from math import copysign, inf
from struct import Struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psgd.spec import Settings
from psgd_workers.messages import BatchId, Gradient, Outcome, Version

__all__ = ["RECORD", "Journal", "RecordKind", "plain", "record_type"]

RECORD = np.dtype(  # of the only server of a run
    [
        ("kind", "u1"),  # of Kind
        ("outcome", "u1"),  # index into Outcome; of a push
        ("worker", "S16"),
        ("slot", "u1"),  # of the worker's pipeline; so are the next two, as `Gradient` has them
        ("number", "<u8"),
        ("carries", "<u8"),
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

VERSION = np.dtype([("incarnation", "<u4"), ("updates", "<u8")])
LAYOUT = "<BB16sBQQdIIIIIQIQff"  # of RECORD: a Struct writes much faster than NumPy
OUTCOMES = {outcome: number for number, outcome in enumerate(Outcome)}
NAMES = RECORD.names or ()
LOSS = NAMES.index("loss")  # of the values of a record
NO_BATCH = BatchId(0, 0, 0)
NO_VERSION = Version(0, 0)


def record_type(partitions: int) -> np.dtype[np.void]:
    """Return the type of a server's records: RECORD and, with several partitions, the versions read of the others.

    Args:
        partitions: of the run.
    """
    return RECORD if partitions == 1 else np.dtype([*RECORD.descr, ("others", VERSION, (partitions - 1,))])


def plain(records: NDArray[np.void]) -> NDArray[np.void]:
    """Return the fields of RECORD alone, whatever the number of partitions.

    Args:
        records: of any array type.

    Raises:
        ValueError: they are no records of a journal.
    """
    names = records.dtype.names or ()
    if names[: len(NAMES)] != NAMES:
        raise ValueError(f"records of {records.dtype}, expected the fields of {RECORD}")
    out = np.empty(len(records), RECORD)
    for name in NAMES:
        out[name] = records[name]
    return out


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

    Args:
        partitions: of the run.

    Attributes:
        type: of the records.
        settings: what each change was to, in order, since the run began: those before a fork are carried over.
    """

    def __init__(self, partitions: int = 1) -> None:
        self.type = record_type(partitions)
        self.settings: list[Settings] = []
        self._layout = Struct(LAYOUT + "IQ" * (partitions - 1))
        assert self._layout.size == self.type.itemsize
        self._no_versions = (0, 0) * (partitions - 1)
        self._records = bytearray(256 * self.type.itemsize)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def fork(self, now: float, origin: Version, version: Version) -> None:
        """A server started or was restored."""
        self._note(RecordKind.FORK, now, version, read=origin)

    def member(self, kind: RecordKind, now: float, worker: str, version: Version) -> None:
        """A worker joined or left."""
        self._note(kind, now, version, worker=worker.encode())

    def change(self, now: float, settings: Settings, version: Version) -> None:
        """The server goes on by other settings."""
        self._note(RecordKind.CHANGE, now, version, batch=BatchId(0, 0, len(self.settings)))
        self.settings.append(settings)

    def skip(self, now: float, batch: BatchId, examples: int, version: Version) -> None:
        """The partition does without a batch."""
        self._note(RecordKind.SKIP, now, version, batch=batch, examples=examples)

    def push(self, now: float, gradient: Gradient, outcome: Outcome, version: Version) -> None:
        """A gradient arrived; `outcome` and `version` are those after it."""
        worker, slot, number, batch, examples, read, _, loss, _, compute_s, _, _, others, carries = gradient
        code = OUTCOMES[outcome]
        name = worker.encode()
        versions = chain.from_iterable(others) if others else ()
        self._append(
            (
                RecordKind.PUSH,
                code,
                name,
                slot,
                number,
                carries,
                now,
                *batch,
                examples,
                *read,
                *version,
                loss,
                compute_s,
                *versions,
            )
        )

    def _note(
        self,
        kind: RecordKind,
        now: float,
        version: Version,
        worker: bytes = b"",
        batch: BatchId = NO_BATCH,
        examples: int = 0,
        read: Version = NO_VERSION,
    ) -> None:
        """Record something else than a push."""
        told = *batch, examples, *read, *version, 0.0, 0.0
        self._append((kind, 0, worker, 0, 0, 0, now, *told, *self._no_versions))

    def take(self) -> NDArray[np.void]:
        """The records since the last call."""
        records = np.frombuffer(self._records, self.type, self._length).copy()
        self._length = 0
        return records

    def _append(self, record: tuple[Any, ...]) -> None:
        offset = self._length * self._layout.size
        if offset == len(self._records):
            self._records = self._records + bytes(len(self._records))
        try:
            self._layout.pack_into(self._records, offset, *record)
        except OverflowError:  # a loss too large for four bytes: a diverged one is infinite there
            loss = record[LOSS]
            self._layout.pack_into(self._records, offset, *record[:LOSS], copysign(inf, loss), *record[LOSS + 1 :])
        self._length += 1
