"""Which records of several servers' journals tell of one and the same push.

A worker names neither pushes nor what it read of other partitions. But the batch, the worker, the loss and the time of
computing are the same in every journal, and of pushes alike in all that, the first is the first everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from psgd.core.server.journal import RecordKind
from psgd_workers.messages import Outcome, Version

__all__ = ["Pushes"]

KEY = ("incarnation", "worker", "epoch", "shard", "index", "loss", "compute_s")
NONE = -1  # no push, or no record
LIST = tuple(Outcome)


class Pushes:
    """All pushes, numbered.

    Args:
        journals: records of `psgd.core.server.journal.RECORD`, by partition.
    """

    def __init__(self, journals: Sequence[NDArray[np.void]]) -> None:
        self._journals = journals
        self._numbers, self._places = _match(journals)

    def __len__(self) -> int:
        return len(self._places[0])

    def number(self, partition: int, place: int) -> int:
        """The push that a record of a partition's journal tells of; NONE: it tells of something else."""
        return int(self._numbers[partition][place])

    def outcome(self, partition: int, push: int) -> Outcome | None:
        """What became of it there; None: the journal does not tell."""
        place = self._places[partition, push]
        return None if place == NONE else LIST[self._journals[partition]["outcome"][place]]

    def reads(self, push: int) -> tuple[Version | None, ...]:
        """The versions it was computed from, by partition; None: its journal does not tell."""
        found: list[Version | None] = []
        for journal, place in zip(self._journals, self._places[:, push].tolist(), strict=True):
            read = None if place == NONE else journal[["read_incarnation", "read_updates"]][place].tolist()
            found.append(None if read is None else Version(*read))
        return tuple(found)

    def earlier(self, partition: int, push: int, worker: bytes, start: int) -> list[int]:
        """A worker's pushes before this one in a partition's journal, from one record on; none, if it is not there."""
        stop = int(self._places[partition, push])
        return [] if stop == NONE else self._of_worker(partition, worker, start, stop)

    def _of_worker(self, partition: int, worker: bytes, start: int, stop: int) -> list[int]:
        numbers = self._numbers[partition][start:stop]
        mine = (self._journals[partition]["worker"][start:stop] == worker) & (numbers != NONE)
        return [int(number) for number in numbers[mine]]

    def oldest_read(self, partition: int, push: int, teller: int, pipeline: int) -> Version:
        """A version that is not newer than what a push read of a partition whose journal does not tell.

        A worker has no older weights than those that came with the answer to an earlier push from the same slot.

        Args:
            partition: whose version.
            push: which.
            teller: a partition whose journal tells of the push.
            pipeline: batches that its worker computes ahead.
        """
        told = self._journals[teller]
        place = int(self._places[teller, push])
        mine = self._journals[partition]
        incarnation = told["incarnation"][place]
        worker = told["worker"][place]
        earlier = self.earlier(teller, push, worker, _begin(told, incarnation))
        for other in reversed(earlier[: len(earlier) - pipeline]):
            if (known := self._places[partition, other]) != NONE:
                return Version(int(incarnation), int(mine["updates"][known]))
        began = _begin(mine, incarnation)
        joins = np.flatnonzero((mine["worker"][began:] == worker) & (mine["kind"][began:] == RecordKind.JOIN))
        return Version(int(incarnation), int(mine["updates"][began + joins[0]]) if len(joins) else 0)


def _match(journals: Sequence[NDArray[np.void]]) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
    """The push of each record, by partition; and the record of each push, `[partitions, pushes]`."""
    places = [np.flatnonzero(records["kind"] == RecordKind.PUSH) for records in journals]
    keys = [_keys(records[place]) for records, place in zip(journals, places, strict=True)]
    _, groups = np.unique(np.concatenate(keys), return_inverse=True)
    ends = np.cumsum([len(key) for key in keys])[:-1]
    turns = [_turns(part) for part in np.split(groups, ends)]
    most = max((int(turn.max(initial=0)) for turn in turns), default=0) + 1
    names, all_numbers = np.unique(groups * most + np.concatenate(turns), return_inverse=True)
    table = np.full((len(journals), len(names)), NONE, np.int64)
    numbers: list[NDArray[np.int64]] = []
    for partition, (records, mine) in enumerate(zip(journals, np.split(all_numbers, ends), strict=True)):
        table[partition, mine] = places[partition]
        numbers.append(np.full(len(records), NONE, np.int64))
        numbers[-1][places[partition]] = mine
    return numbers, table


def _begin(journal: NDArray[np.void], incarnation: int) -> int:
    """The first record of an incarnation."""
    return int(np.argmax(journal["incarnation"] == incarnation))


def _keys(records: NDArray[np.void]) -> NDArray[np.void]:
    """What is the same in every journal; floats by their bits, as a nan is not itself."""
    kinds = [(name, "<u4" if records.dtype[name].kind == "f" else records.dtype[name]) for name in KEY]
    keys = np.empty(len(records), kinds)
    for name in KEY:
        keys[name] = records[name].view("<u4") if records.dtype[name].kind == "f" else records[name]
    return keys


def _turns(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each, how many of the same group come before it."""
    order = np.argsort(groups, kind="stable")
    begins = np.flatnonzero(np.diff(groups[order], prepend=-1))
    turns = np.empty(len(groups), np.int64)
    turns[order] = np.arange(len(groups)) - np.repeat(begins, np.diff(begins, append=len(groups)))
    return turns
