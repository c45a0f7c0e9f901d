"""The journal: one record of fixed size per push, join, leave, change, skip and fork, in the order of the server.

The record of a push has its name (worker, slot, number) and the version of every partition that the gradient was
computed from, so that a replay can compute the same gradient again.
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

__all__ = ["CAPACITY", "RECORD", "Journal", "RecordKind", "plain", "record_type"]

RECORD = np.dtype(  # one record of a run with a single partition
    [
        ("kind", "u1"),  # a RecordKind
        ("outcome", "u1"),  # number of the push's outcome in OUTCOMES
        ("worker", "S16"),
        ("slot", "u1"),  # slot, number and carries name a push, as in `Gradient`
        ("number", "<u8"),
        ("carries", "<u8"),
        ("now", "<f8"),  # time of the server's clock, seconds
        ("epoch", "<u4"),
        ("shard", "<u4"),
        ("index", "<u4"),
        ("examples", "<u4"),
        ("read_incarnation", "<u4"),  # the version that the gradient was computed from
        ("read_updates", "<u8"),
        ("incarnation", "<u4"),  # the server's version after what is recorded
        ("updates", "<u8"),
        ("loss", "<f4"),
        ("compute_s", "<f4"),
    ]
)

VERSION = np.dtype([("incarnation", "<u4"), ("updates", "<u8")])
STRUCT_FORMAT = "<BB16sBQQdIIIIIQIQff"  # RECORD as a Struct, which writes a record much faster than NumPy
OUTCOMES = {outcome: number for number, outcome in enumerate(Outcome)}
FIELDS = RECORD.names or ()
LOSS_INDEX = FIELDS.index("loss")
NO_BATCH = BatchId(0, 0, 0)
NO_VERSION = Version(0, 0)


def record_type(partitions: int) -> np.dtype[np.void]:
    """Return the dtype of a server's records: RECORD and, if there are other partitions, their versions read.

    Args:
        partitions: number of partitions of the run.
    """
    return RECORD if partitions == 1 else np.dtype([*RECORD.descr, ("others", VERSION, (partitions - 1,))])


def plain(records: NDArray[np.void]) -> NDArray[np.void]:
    """Return records with the fields of RECORD only, which every run has, whatever its number of partitions.

    Args:
        records: `[number of records]`, of any `record_type`.

    Raises:
        ValueError: the array does not hold records of a journal.
    """
    names = records.dtype.names or ()
    if names[: len(FIELDS)] != FIELDS:
        raise ValueError(f"the array has type {records.dtype}; expected the fields of {RECORD}")
    out = np.empty(len(records), RECORD)
    for name in FIELDS:
        out[name] = records[name]
    return out


class RecordKind(IntEnum):
    """The kind of event that a record describes."""

    FORK = 0  # a server started as a new incarnation; `read_*` is the version that it continues from
    JOIN = 1
    LEAVE = 2
    PUSH = 3
    CHANGE = 4  # the settings changed; `index` is the number of the new ones in `Journal.settings`
    SKIP = 5  # a batch was settled without its gradient


PUSH = RecordKind.PUSH  # bound once: in Python 3.11, access through the enum takes 80 ns
CAPACITY = 4096  # records in a block, about 400 kB


class Journal:
    """Records since the last `take()`.

    Records are written into a block of fixed size. A full block is copied, and filled from its start again.

    Args:
        partitions: number of partitions of the run.

    Attributes:
        type: dtype of the records.
        block: `[records, bytes of a record]`, uint8: the newest records.
        filled: `[1]`, int64: number of records in the block.
        settings: the settings of every change since the run began, in order; a restored server has the earlier ones.
    """

    def __init__(self, partitions: int = 1) -> None:
        self.type = record_type(partitions)
        self.settings: list[Settings] = []
        self._struct = Struct(STRUCT_FORMAT + "IQ" * (partitions - 1))
        assert self._struct.size == self.type.itemsize
        self._no_versions = (0, 0) * (partitions - 1)
        self.block = np.zeros((CAPACITY, self.type.itemsize), np.uint8)
        self.filled = np.zeros(1, np.int64)
        self._bytes = self.block.reshape(-1).data
        self._filled = self.filled.data
        self._full: list[NDArray[np.void]] = []  # copies of full blocks, oldest first

    def __len__(self) -> int:
        return self._filled[0] + CAPACITY * len(self._full)

    def fork(self, now: float, origin: Version, version: Version) -> None:
        """Record that the server was restored from version `origin` as `version`."""
        self._record(RecordKind.FORK, now, version, read=origin)

    def member(self, kind: RecordKind, now: float, worker: str, version: Version) -> None:
        """Record that a worker joined or left."""
        self._record(kind, now, version, worker=worker.encode())

    def change(self, now: float, settings: Settings, version: Version) -> None:
        """Record that the server continues with other settings, and keep them."""
        self._record(RecordKind.CHANGE, now, version, batch=BatchId(0, 0, len(self.settings)))
        self.settings.append(settings)

    def skip(self, now: float, batch: BatchId, examples: int, version: Version) -> None:
        """Record that a batch was settled without its gradient."""
        self._record(RecordKind.SKIP, now, version, batch=batch, examples=examples)

    def push(self, now: float, gradient: Gradient, outcome: Outcome, version: Version) -> None:
        """Record a push with its outcome, and the version of the server after it."""
        worker, slot, number, batch, examples, read, _, loss, _, compute_s, _, _, others, carries = gradient
        code = OUTCOMES[outcome]
        name = worker.encode()
        versions = chain.from_iterable(others) if others else ()
        fields = (*batch, examples, *read, *version, loss, compute_s, *versions)
        self._append((PUSH, code, name, slot, number, carries, now, *fields))

    def _record(
        self,
        kind: RecordKind,
        now: float,
        version: Version,
        worker: bytes = b"",
        batch: BatchId = NO_BATCH,
        examples: int = 0,
        read: Version = NO_VERSION,
    ) -> None:
        """Append a record of any kind but a push."""
        fields = (*batch, examples, *read, *version, 0.0, 0.0)
        self._append((kind, 0, worker, 0, 0, 0, now, *fields, *self._no_versions))

    def take(self) -> NDArray[np.void]:
        """Return the records since the last call, and drop them here."""
        records = np.concatenate([*self._full, self._copy()])
        self._full = []
        self._filled[0] = 0
        return records

    def _copy(self) -> NDArray[np.void]:
        return np.frombuffer(self._bytes, self.type, self._filled[0]).copy()

    def _append(self, record: tuple[Any, ...]) -> None:
        if self._filled[0] == CAPACITY:
            self._full.append(self._copy())
            self._filled[0] = 0
        offset = self._filled[0] * self._struct.size
        try:
            self._struct.pack_into(self._bytes, offset, *record)
        except OverflowError:  # the loss of a diverging run is too large for float32: it is recorded as infinite
            infinite = copysign(inf, record[LOSS_INDEX])
            record = (*record[:LOSS_INDEX], infinite, *record[LOSS_INDEX + 1 :])
            self._struct.pack_into(self._bytes, offset, *record)
        self._filled[0] += 1
