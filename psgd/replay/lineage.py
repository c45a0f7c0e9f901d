"""The lineage of a checkpoint's part: which records of its server's journal it is made of, a stretch per incarnation.

A resumed run, and a server in the place of a lost one, is a new incarnation that goes on from a checkpoint. What the
one before it did after that checkpoint is a branch that was given up: its segments stay in the journal, and belong to
no lineage.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from psgd.core.server.journal import RECORD, RecordKind
from psgd.errors import JournalError
from psgd.store.checkpoints import Checkpoints, Manifest
from psgd.store.run_directory import RunDirectory
from psgd_workers.messages import BatchId, Outcome, Version

__all__ = ["Record", "Stretch", "read_lineage"]

SEGMENT = re.compile(r"(\d+)-(\d+)-server-(\d+)\.npy")
OUTCOMES = tuple(Outcome)


class Record(NamedTuple):
    """One record, its fields those of `psgd.core.server.journal.RECORD`."""

    kind: int
    code: int
    name: bytes
    now: float
    epoch: int
    shard: int
    place: int
    examples: int
    read_incarnation: int
    read_updates: int
    incarnation: int
    updates: int
    loss: float
    compute_s: float

    @property
    def worker(self) -> str:
        return self.name.decode()

    @property
    def outcome(self) -> Outcome:
        return OUTCOMES[self.code]

    @property
    def batch(self) -> BatchId:
        return BatchId(self.epoch, self.shard, self.place)

    @property
    def read(self) -> Version:
        return Version(self.read_incarnation, self.read_updates)

    @property
    def version(self) -> Version:
        return Version(self.incarnation, self.updates)

    def __str__(self) -> str:
        """What happened, and what came of it."""
        after = f"version {self.updates} of incarnation {self.incarnation}"
        match self.kind:
            case RecordKind.PUSH:
                batch = tuple(self.batch)
                read = tuple(self.read)
                return f"a push by {self.worker} of batch {batch}, read at {read}: {self.outcome.value}, {after}"
            case RecordKind.FORK:
                return f"a fork from {tuple(self.read)}: {after}"
            case _:
                return f"a {RecordKind(self.kind).name.lower()} of {self.worker or self.place}: {after}"


class Stretch(NamedTuple):
    """What one incarnation did, up to the checkpoint that the next one, or the end, goes by."""

    incarnation: int
    workers: int | dict[str, int] | None  # that it was asked for; None: as many as the run's first description says
    pipeline: int  # of its workers
    replaces: bool  # whether it took a lost server's place, and its workers are those that were there
    segments: tuple[NDArray[np.void], ...]  # of RECORD

    def records(self) -> Iterator[Record]:
        for segment in self.segments:
            yield from map(Record._make, segment.tolist())


def read_lineage(run: RunDirectory, manifest: Manifest, partition: int) -> tuple[Stretch, ...]:
    """The records that one server's state is made of, oldest incarnation first.

    Args:
        run: the run directory.
        manifest: of the checkpoint that holds the state.
        partition: which server.

    Raises:
        JournalError: some are missing or damaged, or are not of this run.
    """
    events = run.read_lines("events.jsonl")
    starts = _starts(events)
    names = _Names(run, manifest, partition, [line["name"] for line in events if line["event"] == "checkpoint"])
    stretches: list[Stretch] = []
    last: str | None = manifest.name
    while last is not None:
        number, incarnation = map(int, last.split("-"))
        start = starts.pop(incarnation, None)  # each once, whatever somebody made of the file
        if start is None:
            raise JournalError(
                f"{run.storage.url}/events.jsonl does not tell how incarnation {incarnation} started, which wrote "
                f"checkpoint {last}: without that line nobody knows what it went on from. Restore the file"
            )
        _check_servers(run, start, manifest.partitions)
        segments = tuple(names.read(name, incarnation) for name in names.until(number, incarnation))
        stretch = Stretch(incarnation, start.workers, start.pipeline, start.lost is not None, segments)
        last = start.origin
        _check_forks(run, stretch, last)
        stretches.insert(0, stretch)
    return tuple(stretches)


class _Start(NamedTuple):
    """How an incarnation began."""

    incarnation: int
    origin: str | None  # the checkpoint that it went on from
    workers: int | dict[str, int] | None
    pipeline: int
    servers: int | None  # how many the run had; None: as many as its checkpoint
    lost: int | None  # whose place it took; None: all servers were started with the run


def _starts(events: Iterable[dict[str, Any]]) -> dict[int, _Start]:
    """By incarnation."""
    starts: dict[int, _Start] = {}
    run: dict[str, Any] = {}  # the last one's start
    for line in events:
        match line["event"]:
            case "started":
                run = line
                origin = line["resumed"]
                lost = None
            case "server_started" if line["incarnation"] not in starts:  # else one of those that start with the run
                origin = line["checkpoint"]
                lost = line["partition"]
            case _:
                continue
        number = line["incarnation"]
        starts[number] = _Start(number, origin, run.get("workers"), run.get("pipeline", 0), run.get("servers"), lost)
    return starts


def _check_servers(run: RunDirectory, start: _Start, partitions: int) -> None:
    """Every partition must have gone through the same."""
    if start.servers not in (None, partitions):
        raise JournalError(
            f"{run.storage.url} was trained by {start.servers} servers before it was resumed with {partitions}: a "
            "journal tells what one partition of the weights went through, and there is no replay of a run whose "
            "weights were cut anew"
        )
    if start.lost is not None and partitions > 1:
        raise JournalError(
            f"{run.storage.url} lost server {start.lost} of {partitions}, which incarnation {start.incarnation} "
            "replaced: the others keep gradients of weights that nobody has any more, and there is no replay of such "
            "a run"
        )


class _Names:
    """A server's segments that there are, and those there must be: one for each checkpoint that was committed."""

    def __init__(self, run: RunDirectory, manifest: Manifest, partition: int, committed: Sequence[str]) -> None:
        self._storage = run.storage
        self._partition = partition
        self._there = self._mine(run.storage.names("journal"))
        checkpoints = Checkpoints(run.storage)
        manifests = [checkpoints.manifest(name) for name in checkpoints.committed()]
        self._checksums = {name: checksum for one in [*manifests, manifest] for name, checksum in one.journal.items()}
        self._needed = {f"{name}-server-{partition}.npy" for name in committed} | self._mine(self._checksums)

    def _mine(self, names: Iterable[str]) -> set[str]:
        matches = ((name, SEGMENT.fullmatch(name)) for name in names)
        return {name for name, match in matches if match and int(match[3]) == self._partition}

    def until(self, number: int, incarnation: int) -> list[str]:
        """Those of one incarnation that belong to checkpoints up to that number, oldest first."""
        found = []
        for name in self._needed | self._there:
            match = SEGMENT.fullmatch(name)
            if match and int(match[2]) == incarnation and int(match[1]) <= number:
                found.append((int(match[1]), name))
        names = [name for _, name in sorted(found)]
        if missing := sorted(set(names).difference(self._there)):
            raise JournalError(
                f"{self._storage.url}/journal lacks {', '.join(missing)}: a replay needs every record. Restore what "
                "was deleted"
            )
        return names

    def read(self, name: str, incarnation: int) -> NDArray[np.void]:
        """One segment, checked."""
        path = f"{self._storage.url}/journal/{name}"
        data = self._storage.read(f"journal/{name}")
        checksum = self._checksums.get(name)  # those of checkpoints that were deleted are gone
        if checksum not in (None, sha256(data).hexdigest()):
            raise JournalError(
                f"{path} is not what was committed with its checkpoint: it was changed, or is another run's. "
                "Restore the file"
            )
        try:
            records: NDArray[np.void] = np.load(BytesIO(data), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise JournalError(f"{path} is damaged: {error}. Restore the file") from error
        _check_records(path, records, incarnation)
        return records


def _check_records(path: str, records: NDArray[np.void], incarnation: int) -> None:
    """They must be records of this format, and of that incarnation."""
    known = records.dtype == RECORD and records.ndim == 1
    if not known or (records["kind"] >= len(RecordKind)).any() or (records["outcome"] >= len(OUTCOMES)).any():
        raise JournalError(
            f"{path} has records that this psgd does not know: use the psgd that wrote it (see env.json)"
        )
    if strangers := set(records["incarnation"].tolist()) - {incarnation}:
        raise JournalError(
            f"{path} has records of incarnation {min(strangers)}, not of {incarnation}: it is another run's. "
            "Restore the file"
        )


def _check_forks(run: RunDirectory, stretch: Stretch, resumed: str | None) -> None:
    """An incarnation that goes on from a checkpoint begins with a fork, another with none, and nothing else forks."""
    kinds = np.concatenate([np.zeros(0, np.uint8), *(segment["kind"] for segment in stretch.segments)])
    forks = np.flatnonzero(kinds == RecordKind.FORK).tolist()
    if forks != ([] if resumed is None else [0]):
        origin = "nothing" if resumed is None else f"checkpoint {resumed}"
        raise JournalError(
            f"incarnation {stretch.incarnation} went on from {origin}, says {run.storage.url}/events.jsonl, but its "
            f"{len(kinds)} journal records have forks at {forks}: records are missing, or another run's"
        )
