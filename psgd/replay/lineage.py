"""The lineage of a checkpoint's part: which records of its server's journal it is made of, a stretch per incarnation.

A resumed run, and a server in the place of a lost one, is a new incarnation that goes on from a checkpoint. What the
one before it did after that checkpoint is a branch that was given up. No state contains it; but workers may have read
its weights for gradients that other servers took, and may carry on what compression left out of pushes to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from io import BytesIO
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from psgd.core.server.journal import RECORD, RecordKind, record_type
from psgd.errors import JournalError
from psgd.store.checkpoints import Checkpoints, Manifest
from psgd.store.run_directory import RunDirectory
from psgd_workers.messages import BatchId, Outcome, Version

__all__ = ["Record", "Segment", "Stretch", "read_lineage"]

SEGMENT = re.compile(r"(\d+)-(\d+)-server-(\d+)\.npy")
OUTCOMES = tuple(Outcome)


class Record(NamedTuple):
    """One record, its fields those of `psgd.core.server.journal.record_type`."""

    kind: int
    code: int
    name: bytes
    slot: int
    number: int
    carries: int
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
    others: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, records: NDArray[np.void]) -> Iterator[Record]:
        """Read the records of a segment."""
        fields = len(RECORD.names or ())
        for told in records.tolist():
            others = tuple(tuple(version) for versions in told[fields:] for version in versions.tolist())
            yield cls._make((*told[:fields], others))

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

    def reads(self, partition: int) -> tuple[Version, ...]:
        """Return every partition's version that a gradient was computed from.

        Args:
            partition: whose journal holds the record.
        """
        others = [Version(*other) for other in self.others]
        return (*others[:partition], self.read, *others[partition:])

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


class Segment(NamedTuple):
    """The records between two checkpoints."""

    checkpoint: str  # at its end; perhaps never committed
    kept: bool  # whether the lineage contains it; otherwise it was given up
    records: NDArray[np.void]  # of `record_type`


class Stretch(NamedTuple):
    """What one incarnation did."""

    session: int  # the run's incarnation when its driver started: workers bear their names for one session
    incarnation: int
    origin: str | None  # the checkpoint that it went on from; None: the initial weights
    workers: int | dict[str, int] | None  # that it was asked for; None: as many as the run's first description says
    segments: tuple[Segment, ...]  # oldest first

    @property
    def kept(self) -> bool:
        """Return True if the lineage contains some of it."""
        return any(segment.kept for segment in self.segments)


def read_lineage(run: RunDirectory, manifest: Manifest, partition: int, branches: bool = False) -> tuple[Stretch, ...]:
    """Read the records that one server's state is made of, oldest incarnation first.

    Args:
        run: the run directory.
        manifest: of the checkpoint that holds the state.
        partition: which server.
        branches: whether to read what was given up as well, as far as the journal has it.

    Raises:
        JournalError: some are missing or damaged, or are not of this run.
    """
    events = run.read_lines("events.jsonl")
    starts = _Starts(run, _starts(events), partition)
    kept = starts.chain(manifest)
    names = _Names(run, manifest, partition, [line["name"] for line in events if line["event"] == "checkpoint"])
    stretches = []
    for start, until in starts.played(kept, branches):
        segments = names.segments(start.incarnation, until, kept.get(start.incarnation, -1), branches)
        stretch = Stretch(start.session, start.incarnation, start.origin, start.workers, _known(segments))
        _check_forks(run, stretch)
        stretches.append(stretch)
    return tuple(stretches)


def _known(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    """Cut a given-up branch at its first change: only those of the lineage have their settings in the checkpoint."""
    found: list[Segment] = []
    for segment in segments:
        changes = np.flatnonzero(segment.records["kind"] == RecordKind.CHANGE)
        if not segment.kept and len(changes):
            return (*found, segment._replace(records=segment.records[: changes[0]]))
        found.append(segment)
    return tuple(found)


class _Start(NamedTuple):
    """How an incarnation began."""

    session: int
    incarnation: int
    origin: str | None  # the checkpoint that it went on from
    workers: int | dict[str, int] | None
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
        session = run.get("incarnation", number)
        starts[number] = _Start(session, number, origin, run.get("workers"), run.get("servers"), lost)
    return starts


class _Starts:
    """The incarnations of one server among all of a run."""

    def __init__(self, run: RunDirectory, starts: dict[int, _Start], partition: int) -> None:
        self._url = run.storage.url
        self._all = starts
        self._mine = [starts[number] for number in sorted(starts) if starts[number].lost in (None, partition)]

    def chain(self, manifest: Manifest) -> dict[int, int]:
        """Follow a checkpoint back to the initial weights.

        Returns:
            Incarnation of the server -> number of its newest checkpoint in the lineage.
        """
        newest: dict[int, int] = {}
        last: str | None = manifest.name
        while last is not None:
            number, incarnation = map(int, last.split("-"))
            start = self._of(last, incarnation)
            if start.incarnation in newest:
                raise JournalError(
                    f"{self._url}/events.jsonl says that incarnation {start.incarnation} went on from checkpoint "
                    f"{last}, which it wrote itself: lines are another run's. Restore the file"
                )
            self._check_servers(start, manifest.partitions)
            newest[start.incarnation] = number
            last = start.origin
        return newest

    def _of(self, checkpoint: str, incarnation: int) -> _Start:
        """Return how the server began that wrote a checkpoint of that incarnation of the run."""
        run = self._all.get(incarnation)
        mine = [start for start in self._mine if run and run.session <= start.incarnation <= incarnation]
        if not mine:
            raise JournalError(
                f"{self._url}/events.jsonl does not tell how incarnation {incarnation} started, which wrote "
                f"checkpoint {checkpoint}: without that line nobody knows what it went on from. Restore the file"
            )
        return mine[-1]

    def _check_servers(self, start: _Start, partitions: int) -> None:
        """Every partition must have gone through the same."""
        if start.servers not in (None, partitions):
            raise JournalError(
                f"{self._url} was trained by {start.servers} servers before it was resumed with {partitions}: a "
                "journal tells what one partition of the weights went through, and there is no replay of a run whose "
                "weights were cut anew"
            )

    def played(self, kept: dict[int, int], branches: bool) -> list[tuple[_Start, int]]:
        """Return each incarnation to be read, and the last of the run's before the server's next one."""
        last = {self._all[number].session: number for number in sorted(kept)}  # of the server's, by session
        found = []
        for start in self._mine:
            if start.incarnation in kept or (branches and start.incarnation < last.get(start.session, 0)):
                later = [other.incarnation for other in self._mine if other.incarnation > start.incarnation]
                later += [other.session for other in self._all.values() if other.session > start.session]
                found.append((start, min(later, default=max(self._all) + 1) - 1))
        return found


class _Names:
    """A server's segments that there are, and those there must be: one for each checkpoint that was committed."""

    def __init__(self, run: RunDirectory, manifest: Manifest, partition: int, committed: Sequence[str]) -> None:
        self._storage = run.storage
        self._partition = partition
        self._partitions = manifest.partitions
        self._there = self._mine(run.storage.names("journal"))
        checkpoints = Checkpoints(run.storage)
        manifests = [checkpoints.manifest(name) for name in checkpoints.committed()]
        self._checksums = {name: checksum for one in [*manifests, manifest] for name, checksum in one.journal.items()}
        self._needed = {f"{name}-server-{partition}.npy" for name in committed} | self._mine(self._checksums)

    def _mine(self, names: Iterable[str]) -> set[str]:
        matches = ((name, SEGMENT.fullmatch(name)) for name in names)
        return {name for name, match in matches if match and int(match[3]) == self._partition}

    def segments(self, incarnation: int, last: int, newest: int, branches: bool) -> list[Segment]:
        """Read the segments of one incarnation of the server, oldest first.

        Args:
            incarnation: of the server.
            last: incarnation of the run until which that server was there.
            newest: number of the newest of its checkpoints in the lineage.
            branches: whether to go on after that, until a segment is missing or damaged.
        """
        kept, given_up = self._of(incarnation, last, newest)
        if missing := sorted(set(kept).difference(self._there)):
            raise JournalError(
                f"{self._storage.url}/journal lacks {', '.join(missing)}: a replay needs every record. Restore what "
                "was deleted"
            )
        found = [Segment(_checkpoint(name), True, self._read(name, incarnation)) for name in kept]
        for name in takewhile(self._there.__contains__, given_up if branches else ()):
            try:
                found.append(Segment(_checkpoint(name), False, self._read(name, incarnation)))
            except JournalError:  # its writer was killed; a replay that needs these records says so
                break
        return found

    def _of(self, first: int, last: int, newest: int) -> tuple[list[str], list[str]]:
        """Return the names of segments up to a checkpoint's number, and after it, of those incarnations of the run."""
        found = []
        for name in self._needed | self._there:
            match = SEGMENT.fullmatch(name)
            if match and first <= int(match[2]) <= last:
                found.append((int(match[1]), name))
        found.sort()
        kept = [name for number, name in found if number <= newest]
        return kept, [name for _, name in found[len(kept) :]]

    def _read(self, name: str, incarnation: int) -> NDArray[np.void]:
        """Read one segment and check it."""
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
        _check_records(path, records, incarnation, self._partitions)
        return records


def _checkpoint(segment: str) -> str:
    return segment.partition("-server-")[0]


def _check_records(path: str, records: NDArray[np.void], incarnation: int, partitions: int) -> None:
    """They must be records of this format, and of that incarnation."""
    known = records.dtype == record_type(partitions) and records.ndim == 1
    if not known or (records["kind"] >= len(RecordKind)).any() or (records["outcome"] >= len(OUTCOMES)).any():
        raise JournalError(
            f"{path} has records that this psgd does not know: use the psgd that wrote it (see env.json)"
        )
    if strangers := set(records["incarnation"].tolist()) - {incarnation}:
        raise JournalError(
            f"{path} has records of incarnation {min(strangers)}, not of {incarnation}: it is another run's. "
            "Restore the file"
        )


def _check_forks(run: RunDirectory, stretch: Stretch) -> None:
    """An incarnation that goes on from a checkpoint begins with a fork, another with none, and nothing else forks."""
    kinds = np.concatenate([np.zeros(0, np.uint8), *(segment.records["kind"] for segment in stretch.segments)])
    forks = np.flatnonzero(kinds == RecordKind.FORK).tolist()
    if forks != ([] if stretch.origin is None else [0]) and (stretch.kept or len(kinds)):
        origin = "nothing" if stretch.origin is None else f"checkpoint {stretch.origin}"
        raise JournalError(
            f"incarnation {stretch.incarnation} went on from {origin}, says {run.storage.url}/events.jsonl, but its "
            f"{len(kinds)} journal records have forks at {forks}: records are missing, or another run's"
        )
