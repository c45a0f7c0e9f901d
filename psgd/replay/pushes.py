"""The pushes of a run: finds the records of one push in the journals of several servers.

Each record of a push names the version of every partition that the gradient was computed from.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from psgd.core.server.journal import OUTCOMES, RECORD, RecordKind
from psgd.errors import JournalError
from psgd.replay.lineage import IncarnationJournal
from psgd_workers.counting import counted
from psgd_workers.gradients.sender import TAKEN
from psgd_workers.messages import BatchId, Version

__all__ = ["NO_PUSH", "Pushes"]

TAKEN_CODES = [OUTCOMES[outcome] for outcome in TAKEN]
NAME_FIELDS = ("worker", "slot", "number")  # name a push within one session
BATCH_FIELDS = ("epoch", "shard", "index", "examples")  # equal in all records of a push, as are the versions read
NO_PUSH = -1  # for a record that is no push, or a push that the server refused


class Pushes:
    """The pushes that at least one server used, numbered from 0.

    Args:
        lineages: lineage of every server, by partition.

    Raises:
        JournalError: two records of one push contradict each other.
    """

    def __init__(self, lineages: Sequence[Sequence[IncarnationJournal]]) -> None:
        journals = [_all_records(lineage) for lineage in lineages]
        self._starts = np.cumsum([0, *map(len, journals)]).tolist()  # first index of each journal in `_push_numbers`
        taken = np.flatnonzero(np.concatenate([_is_taken(records) for records in journals]))
        names = np.concatenate([_names(lineage) for lineage in lineages])[taken]
        contents = np.concatenate([_contents(records, partition) for partition, records in enumerate(journals)])[taken]
        _, first, numbers = np.unique(names, return_index=True, return_inverse=True)
        self._push_numbers = np.full(self._starts[-1], NO_PUSH, np.int64)  # of each record of all journals
        self._push_numbers[taken] = numbers
        self._left = np.bincount(numbers, minlength=len(first))  # records of each push that are not counted off
        self._contents = contents[first]  # [pushes, fields]
        if (different := np.flatnonzero((contents != self._contents[numbers]).any(axis=1))).size:
            raise JournalError(_contradiction(self._contents[numbers[different[0]]], contents[different[0]]))

    def __len__(self) -> int:
        return len(self._contents)

    def push_of(self, partition: int, position: int) -> int:
        """Return the number of the push that a record describes, or `NO_PUSH`.

        Args:
            partition: partition whose journal holds the record.
            position: position of the record among all records of the partition's lineage.
        """
        return int(self._push_numbers[self._starts[partition] + position])

    def reads(self, push: int) -> tuple[Version, ...]:
        """Return the version of each partition that a push was computed from."""
        return _versions(self._contents[push])

    def count_off(self, push: int) -> bool:
        """Count off one record of a push that was replayed or is skipped. Return True if it was the last one."""
        self._left[push] -= 1
        return bool(self._left[push] == 0)


def _all_records(lineage: Sequence[IncarnationJournal]) -> NDArray[np.void]:
    return np.concatenate([segment.records for journal in lineage for segment in journal.segments])


def _is_taken(records: NDArray[np.void]) -> NDArray[np.bool_]:
    """Return True for each record of a push whose gradient the server used. `[records]`."""
    taken: NDArray[np.bool_] = (records["kind"] == RecordKind.PUSH) & np.isin(records["outcome"], TAKEN_CODES)
    return taken


def _names(lineage: Sequence[IncarnationJournal]) -> NDArray[np.void]:
    """Return the name of each record's push: session, worker, slot and number. `[records]`."""
    records = _all_records(lineage)
    sizes = [sum(len(segment.records) for segment in journal.segments) for journal in lineage]
    names = np.empty(len(records), [("session", "<u4"), *((name, records.dtype[name]) for name in NAME_FIELDS)])
    names["session"] = np.repeat([journal.session for journal in lineage], sizes)
    for name in NAME_FIELDS:
        names[name] = records[name]
    return names


def _contents(records: NDArray[np.void], partition: int) -> NDArray[np.int64]:
    """Return the values that all records of a push must share: batch and versions. `[records, fields]`."""
    own = np.stack([records["read_incarnation"], records["read_updates"]], axis=1).astype(np.int64)
    versions = [own]
    if records.dtype != RECORD:
        others = records["others"]
        pairs = np.stack([others["incarnation"], others["updates"]], axis=2).astype(np.int64)
        versions = [*pairs[:, :partition].swapaxes(0, 1), own, *pairs[:, partition:].swapaxes(0, 1)]
    return np.concatenate(
        [np.stack([records[name].astype(np.int64) for name in BATCH_FIELDS], axis=1), *versions], axis=1
    )


def _versions(contents: NDArray[np.int64]) -> tuple[Version, ...]:
    return tuple(Version(*version) for version in contents[len(BATCH_FIELDS) :].reshape(-1, 2).tolist())


def _contradiction(one: NDArray[np.int64], other: NDArray[np.int64]) -> str:
    """Return a message about two records of one push, given their `_contents`."""
    texts = [
        f"{BatchId(*contents[:3].tolist()).text} of {counted(int(contents[3]), 'example')}, computed from versions "
        f"{list(map(tuple, _versions(contents)))}"
        for contents in (one, other)
    ]
    return (
        f"the journals of two servers contradict each other about one push: one says {texts[0]}, and the other says "
        f"{texts[1]}. One journal belongs to another run: restore it"
    )
