"""The lineage of a server's state: the journal records that led to it, in one `IncarnationJournal` per incarnation.

When a run is resumed or a lost server is restored, a new incarnation continues from a checkpoint. The records that the
previous incarnation made after that checkpoint are an abandoned branch, which no later state of the server contains. A
replay may still need it: workers may have computed gradients from its weights that other servers used, and may have
added what compression left out of a push on the branch to a later push.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from psgd.core.server.journal import RECORD, RecordKind
from psgd.errors import JournalError
from psgd.store.checkpoints import Checkpoints
from psgd.store.manifest import Manifest
from psgd.store.run_directory import RunDirectory
from psgd.store.segments import parse_segment
from psgd_workers.counting import counted
from psgd_workers.messages import BatchId, Outcome, Version

__all__ = ["IncarnationJournal", "Record", "Segment", "read_lineage"]

SEGMENT = re.compile(r"(\d+)-(\d+)-server-(\d+)\.npy")
OUTCOMES = tuple(Outcome)


class Record(NamedTuple):
    """One journal record, with the fields of `psgd.core.server.journal.record_type`."""

    kind: int  # a `RecordKind`
    outcome_code: int  # index of the push's outcome in `Outcome`
    worker_name: bytes  # name of the worker, encoded
    slot: int  # slot of the worker's pipeline
    number: int  # number of the push within its slot
    carries: int  # number of the push whose remainder, left out by compression, is in this push
    now: float  # time of the server's clock, in seconds
    epoch: int
    shard: int
    batch_index: int  # index of the batch in its shard; in a record of kind CHANGE, index of the settings
    examples: int
    read_incarnation: int  # version that the gradient was computed from
    read_updates: int
    incarnation: int  # the server's version after the record
    updates: int
    loss: float
    compute_s: float
    others: tuple[tuple[int, int], ...] = ()  # versions read of the other partitions, in their order

    @classmethod
    def of(cls, records: NDArray[np.void]) -> Iterator[Record]:
        """Yield the records of an array of `record_type`, in order."""
        fields = len(RECORD.names or ())
        for row in records.tolist():
            others = tuple(tuple(version) for versions in row[fields:] for version in versions.tolist())
            yield cls._make((*row[:fields], others))

    @property
    def worker(self) -> str:
        return self.worker_name.decode()

    @property
    def outcome(self) -> Outcome:
        return OUTCOMES[self.outcome_code]

    @property
    def batch(self) -> BatchId:
        return BatchId(self.epoch, self.shard, self.batch_index)

    @property
    def read(self) -> Version:
        return Version(self.read_incarnation, self.read_updates)

    @property
    def version(self) -> Version:
        return Version(self.incarnation, self.updates)

    def reads(self, partition: int) -> tuple[Version, ...]:
        """Return the version of every partition that the push's gradient was computed from.

        Args:
            partition: partition whose journal holds the record.
        """
        others = [Version(*other) for other in self.others]
        return (*others[:partition], self.read, *others[partition:])

    def __str__(self) -> str:
        """Return a description of the record and of the server's version after it."""
        before = f"version {self.read_updates} of incarnation {self.read_incarnation}"
        match self.kind:
            case RecordKind.PUSH:
                event = f"a push by {self.worker} of {self.batch.text}, computed from {before}: {self.outcome.value}"
            case RecordKind.FORK:
                event = f"a fork from {before}"
            case RecordKind.CHANGE:
                event = f"a change to settings {self.batch_index}"
            case RecordKind.SKIP:
                event = f"a skip of {self.batch.text}"
            case _:
                event = f"a {RecordKind(self.kind).name.lower()} of {self.worker}"
        return f"{event}, after which the server had version {self.updates} of incarnation {self.incarnation}"


class Segment(NamedTuple):
    """The records between two checkpoints."""

    checkpoint: str  # name of the checkpoint at its end, which may never have been committed
    in_lineage: bool  # True if the state contains these records; False: they are part of an abandoned branch
    records: NDArray[np.void]  # array of the dtype `record_type`


class IncarnationJournal(NamedTuple):
    """The journal of one incarnation of a server."""

    session: int  # the run's incarnation when its driver started; names of workers are unique within a session
    incarnation: int  # incarnation of the server
    origin: str | None  # name of the checkpoint that it continued from; None: the initial weights
    workers: int | dict[str, int] | None  # value of `scaling.workers` in this session; None: as in the run's job
    segments: tuple[Segment, ...]  # oldest first

    @property
    def in_lineage(self) -> bool:
        """Return True if the state contains at least one of the segments."""
        return any(segment.in_lineage for segment in self.segments)


def read_lineage(
    run: RunDirectory, manifest: Manifest, partition: int, branches: bool = False
) -> tuple[IncarnationJournal, ...]:
    """Read the records that led to one server's state in a checkpoint.

    Args:
        run: the run directory.
        manifest: manifest of the checkpoint.
        partition: partition of the server.
        branches: True to read abandoned branches as well, as far as their records exist.

    Returns:
        The journals of the server's incarnations, oldest first.

    Raises:
        JournalError: records are missing, damaged, or belong to another run.
    """
    events = run.read_lines("events.jsonl")
    starts = _ServerStarts(run, _read_starts(events), partition)
    newest = starts.trace_back(manifest)
    committed = [line["name"] for line in events if line["event"] == "checkpoint"]
    files = _SegmentFiles(run, manifest, partition, committed)
    journals = []
    for start, last in starts.to_read(newest, branches):
        found = files.read(start.incarnation, last, newest.get(start.incarnation, -1), branches)
        segments = _cut_at_change(found)
        journal = IncarnationJournal(start.session, start.incarnation, start.origin, start.workers, segments)
        _check_forks(run, journal)
        journals.append(journal)
    return tuple(journals)


def _cut_at_change(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    """Cut an abandoned branch at its first change of settings, as the checkpoint only has the lineage's settings."""
    found: list[Segment] = []
    for segment in segments:
        changes = np.flatnonzero(segment.records["kind"] == RecordKind.CHANGE)
        if not segment.in_lineage and len(changes):
            return (*found, segment._replace(records=segment.records[: changes[0]]))
        found.append(segment)
    return tuple(found)


class _Start(NamedTuple):
    """The start of an incarnation: all servers start with the run, or one server replaces a lost one."""

    session: int
    incarnation: int
    origin: str | None  # name of the checkpoint that it continued from
    workers: int | dict[str, int] | None
    servers: int | None  # number of servers in the run; None: as many as the checkpoint has
    lost: int | None  # partition of the lost server; None: all servers were started with the run


def _read_starts(events: Iterable[dict[str, Any]]) -> dict[int, _Start]:
    """Return the starts that a run's events describe, by incarnation."""
    starts: dict[int, _Start] = {}
    run: dict[str, Any] = {}  # newest event "started"
    for line in events:
        match line["event"]:
            case "started":
                run = line
                origin = line["resumed"]
                lost = None
            case "server_started" if line["incarnation"] not in starts:  # else the server was started with the run
                origin = line["checkpoint"]
                lost = line["partition"]
            case _:
                continue
        number = line["incarnation"]
        session = run.get("incarnation", number)
        starts[number] = _Start(session, number, origin, run.get("workers"), run.get("servers"), lost)
    return starts


class _ServerStarts:
    """The starts of one server's incarnations.

    Args:
        run: the run directory.
        starts: starts of all incarnations of the run.
        partition: partition of the server.
    """

    def __init__(self, run: RunDirectory, starts: dict[int, _Start], partition: int) -> None:
        self._url = run.storage.url
        self._all = starts
        self._own = [starts[number] for number in sorted(starts) if starts[number].lost in (None, partition)]

    def trace_back(self, manifest: Manifest) -> dict[int, int]:
        """Follow a checkpoint's lineage back to the initial weights.

        Returns:
            For each incarnation of the server in the lineage, the number of its newest checkpoint in the lineage.
        """
        newest: dict[int, int] = {}
        checkpoint: str | None = manifest.name
        while checkpoint is not None:
            number, incarnation = map(int, checkpoint.split("-"))
            start = self._writer_of(checkpoint, incarnation)
            if start.incarnation in newest:
                raise JournalError(
                    f"{self._url}/events.jsonl says that incarnation {start.incarnation} continued from checkpoint "
                    f"{checkpoint}, which it wrote itself: lines belong to another run. Restore the file"
                )
            self._check_servers(start, manifest.partitions)
            newest[start.incarnation] = number
            checkpoint = start.origin
        return newest

    def _writer_of(self, checkpoint: str, incarnation: int) -> _Start:
        """Return the start of the server that wrote its part of a checkpoint, in this incarnation of the run."""
        run = self._all.get(incarnation)
        starts = [start for start in self._own if run and run.session <= start.incarnation <= incarnation]
        if not starts:
            raise JournalError(
                f"{self._url}/events.jsonl lacks the start of incarnation {incarnation}, which wrote checkpoint "
                f"{checkpoint}: a replay needs that line to know where the incarnation continued from. Restore the file"
            )
        return starts[-1]

    def _check_servers(self, start: _Start, partitions: int) -> None:
        """Raise an error if the run had another number of servers when this incarnation started."""
        if start.servers not in (None, partitions):
            raise JournalError(
                f"{self._url} was trained by {counted(start.servers, 'server')} before it was resumed "
                f"with {partitions}. A run cannot be replayed across a change of the number of servers, because each "
                "journal is of one partition"
            )

    def to_read(self, newest: dict[int, int], branches: bool) -> list[tuple[_Start, int]]:
        """Return the incarnations to read, oldest first.

        Args:
            newest: result of `trace_back`.
            branches: True to include abandoned incarnations that are older than the session's last one in the lineage.

        Returns:
            Pairs of the start of an incarnation, and the last incarnation of the run in which that server was alive.
        """
        last = {self._all[number].session: number for number in sorted(newest)}  # in the lineage, by session
        found = []
        for start in self._own:
            if start.incarnation in newest or (branches and start.incarnation < last.get(start.session, 0)):
                later = [other.incarnation for other in self._own if other.incarnation > start.incarnation]
                later += [other.session for other in self._all.values() if other.session > start.session]
                found.append((start, min(later, default=max(self._all) + 1) - 1))
        return found


class _SegmentFiles:
    """The files of one server's journal: the existing ones, and the required ones.

    Args:
        run: the run directory.
        manifest: manifest of the checkpoint to replay.
        partition: partition of the server.
        committed: names of all checkpoints that were committed, each of which requires a segment.
    """

    def __init__(self, run: RunDirectory, manifest: Manifest, partition: int, committed: Sequence[str]) -> None:
        self._storage = run.storage
        self._partition = partition
        self._partitions = manifest.partitions
        self._existing = self._own(run.storage.names("journal"))
        checkpoints = Checkpoints(run.storage)
        manifests = [checkpoints.manifest(name) for name in checkpoints.committed()]
        self._checksums = {name: checksum for one in [*manifests, manifest] for name, checksum in one.journal.items()}
        self._required = {f"{name}-server-{partition}.npy" for name in committed} | self._own(self._checksums)

    def _own(self, names: Iterable[str]) -> set[str]:
        """Return the names of this server's segments."""
        matches = ((name, SEGMENT.fullmatch(name)) for name in names)
        return {name for name, match in matches if match and int(match[3]) == self._partition}

    def read(self, incarnation: int, last: int, newest: int, branches: bool) -> list[Segment]:
        """Read the segments of one incarnation of the server, oldest first.

        Args:
            incarnation: incarnation of the server.
            last: last incarnation of the run in which this server was alive.
            newest: number of the server's newest checkpoint in the lineage.
            branches: True to read later segments as well, until one is missing or damaged.

        Raises:
            JournalError: a segment of the lineage is missing or damaged.
        """
        lineage, branch = self._names(incarnation, last, newest)
        if missing := sorted(set(lineage).difference(self._existing)):
            raise JournalError(
                f"{self._storage.url}/journal lacks {', '.join(missing)}: a replay needs every record. Restore the "
                "deleted files"
            )
        segments = [Segment(_checkpoint(name), True, self._read(name, incarnation)) for name in lineage]
        for name in takewhile(self._existing.__contains__, branch if branches else ()):
            try:
                segments.append(Segment(_checkpoint(name), False, self._read(name, incarnation)))
            except JournalError:  # its writer was killed; a replay that needs these records raises an error
                break
        return segments

    def _names(self, first: int, last: int, newest: int) -> tuple[list[str], list[str]]:
        """Return the names of the segments that the run wrote in its incarnations `first` to `last`.

        Returns:
            The names up to the checkpoint with number `newest`, and the later ones, both oldest first.
        """
        found = []
        for name in self._required | self._existing:
            match = SEGMENT.fullmatch(name)
            if match and first <= int(match[2]) <= last:
                found.append((int(match[1]), name))
        found.sort()
        lineage = [name for number, name in found if number <= newest]
        return lineage, [name for _, name in found[len(lineage) :]]

    def _read(self, name: str, incarnation: int) -> NDArray[np.void]:
        """Read one segment and check it."""
        path = f"{self._storage.url}/journal/{name}"
        data = self._storage.read(f"journal/{name}")
        checksum = self._checksums.get(name)  # None if the manifest with the checksum was deleted
        if checksum not in (None, sha256(data).hexdigest()):
            raise JournalError(
                f"{path} is not the file that was committed with its checkpoint: it was changed, or belongs to another "
                "run. Restore the file"
            )
        records = parse_segment(data, path, self._partitions)
        _check_incarnation(path, records, incarnation)
        return records


def _checkpoint(segment: str) -> str:
    return segment.partition("-server-")[0]


def _check_incarnation(path: str, records: NDArray[np.void], incarnation: int) -> None:
    """Raise an error unless all records are of this incarnation."""
    if others := set(records["incarnation"].tolist()) - {incarnation}:
        raise JournalError(
            f"{path} has records of incarnation {min(others)}, not of {incarnation}: it belongs to another run. "
            "Restore the file"
        )


def _check_forks(run: RunDirectory, journal: IncarnationJournal) -> None:
    """Raise an error if a journal's forks do not agree with its origin.

    A journal that continues from a checkpoint has exactly one fork, as its first record. Any other journal has none.
    """
    kinds = np.concatenate([np.zeros(0, np.uint8), *(segment.records["kind"] for segment in journal.segments)])
    forks = np.flatnonzero(kinds == RecordKind.FORK).tolist()
    if forks != ([] if journal.origin is None else [0]) and (journal.in_lineage or len(kinds)):
        origin = "the initial weights" if journal.origin is None else f"checkpoint {journal.origin}"
        raise JournalError(
            f"{run.storage.url}/events.jsonl says that incarnation {journal.incarnation} continued from {origin}, but "
            f"its {len(kinds)} journal records have forks at {forks}: records are missing or belong to another run. "
            "Restore the journal"
        )
