"""Which records of several servers' journals tell of one and the same push, and what it was computed from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from psgd.core.server.journal import OUTCOMES, RECORD, RecordKind
from psgd.errors import JournalError
from psgd.replay.lineage import Stretch
from psgd_workers.gradients.sender import TAKEN
from psgd_workers.messages import Version

__all__ = ["NONE", "Pushes"]

CODES = [OUTCOMES[outcome] for outcome in TAKEN]
NAME = ("worker", "slot", "number")  # of a push, within a session
SAME = ("epoch", "shard", "index", "examples")  # in all of its records, as are the versions read
NONE = -1  # for a record that tells of no push, or of one that was not taken


class Pushes:
    """The pushes that some server took, numbered.

    Args:
        lineages: of every server, by partition.

    Raises:
        JournalError: two records of one push contradict each other.
    """

    def __init__(self, lineages: Sequence[Sequence[Stretch]]) -> None:
        journals = [_journal(lineage) for lineage in lineages]
        self._begins = np.cumsum([0, *map(len, journals)]).tolist()  # of each journal in the following
        taken = np.flatnonzero(np.concatenate([_is_taken(records) for records in journals]))
        names = np.concatenate([_names(lineage) for lineage in lineages])[taken]
        told = np.concatenate([_told(records, partition) for partition, records in enumerate(journals)])[taken]
        _, first, numbers = np.unique(names, return_index=True, return_inverse=True)
        self._numbers = np.full(self._begins[-1], NONE, np.int64)
        self._numbers[taken] = numbers
        self._left = np.bincount(numbers, minlength=len(first))
        self._told = told[first]  # [pushes, fields]
        if (strange := np.flatnonzero((told != self._told[numbers]).any(axis=1))).size:
            raise JournalError(_contradiction(self._told[numbers[strange[0]]], told[strange[0]]))

    def __len__(self) -> int:
        return len(self._told)

    def number(self, partition: int, place: int) -> int:
        """Return the push that a record of a partition's journal tells of, or NONE."""
        return int(self._numbers[self._begins[partition] + place])

    def reads(self, push: int) -> tuple[Version, ...]:
        """Return the version of each partition that it was computed from."""
        return _versions(self._told[push])

    def done(self, push: int) -> bool:
        """Note that one of its records was replayed, or never will be; return True if that was the last."""
        self._left[push] -= 1
        return bool(self._left[push] == 0)


def _journal(lineage: Sequence[Stretch]) -> NDArray[np.void]:
    return np.concatenate([segment.records for stretch in lineage for segment in stretch.segments])


def _is_taken(records: NDArray[np.void]) -> NDArray[np.bool_]:
    taken: NDArray[np.bool_] = (records["kind"] == RecordKind.PUSH) & np.isin(records["outcome"], CODES)
    return taken


def _names(lineage: Sequence[Stretch]) -> NDArray[np.void]:
    """Return the name of each record's push."""
    records = _journal(lineage)
    sizes = [sum(len(segment.records) for segment in stretch.segments) for stretch in lineage]
    names = np.empty(len(records), [("session", "<u4"), *((name, records.dtype[name]) for name in NAME)])
    names["session"] = np.repeat([stretch.session for stretch in lineage], sizes)
    for name in NAME:
        names[name] = records[name]
    return names


def _told(records: NDArray[np.void], partition: int) -> NDArray[np.int64]:
    """Return what all records of a push must say alike: batch, and versions by partition. `[records, fields]`."""
    own = np.stack([records["read_incarnation"], records["read_updates"]], axis=1).astype(np.int64)
    versions = [own]
    if records.dtype != RECORD:
        others = records["others"]
        pairs = np.stack([others["incarnation"], others["updates"]], axis=2).astype(np.int64)
        versions = [*pairs[:, :partition].swapaxes(0, 1), own, *pairs[:, partition:].swapaxes(0, 1)]
    return np.concatenate([np.stack([records[name].astype(np.int64) for name in SAME], axis=1), *versions], axis=1)


def _versions(told: NDArray[np.int64]) -> tuple[Version, ...]:
    return tuple(Version(*version) for version in told[len(SAME) :].reshape(-1, 2).tolist())


def _contradiction(one: NDArray[np.int64], other: NDArray[np.int64]) -> str:
    accounts = [
        f"batch {tuple(told[:3].tolist())} of {told[3]} examples, read at {list(map(tuple, _versions(told)))}"
        for told in (one, other)
    ]
    return (
        f"the journals of two servers contradict each other about one push: {accounts[0]}, says one, and {accounts[1]} "
        "says the other. One of them is another run's: restore it"
    )
