"""One server of a replay: it goes through its journal, and keeps what is still to be read of its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from copy import deepcopy
from math import nan
from typing import NamedTuple

import numpy as np

from psgd.core.server.journal import RecordKind
from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.partitions import Partition
from psgd.core.server.state import ServerState
from psgd.errors import JournalError, ReplayError
from psgd.job import OpenJob
from psgd.replay.lineage import Record, Segment, Stretch
from psgd.spec import JobSpec, ScalingConfig, Settings
from psgd_workers.gradients.sender import PartSender
from psgd_workers.messages import FloatArray, Gradient, Outcome, Version

__all__ = ["Computed", "ReplayServer"]


class Computed(NamedTuple):
    """A gradient, and what it was computed from."""

    values: FloatArray  # [num_parameters]
    weights: FloatArray  # [num_parameters]
    reads: Sequence[Version]  # by partition
    loss: float
    norm: float


class ReplayServer:
    """One server, which goes through its journal.

    A branch that was given up is played until its end, or until `give_up`; then the server goes on from the state that
    it had at the checkpoint.

    Args:
        job: of the run.
        partition: of the weights.
        lineage: what happened.
        changes: the settings that its records of changes number.

    Attributes:
        number: of the partition.
        slice: of the weights.
        place: of the next record, among all of the lineage.
        next: that record; None: there is none, or not before `start`.
        on_lineage: whether its weights are of the lineage, not of a branch that was given up.
        updates: of the lineage's newest state that it came to.
        end: its updates and weights where the lineage ends; None: it has not come there.
        pushes: of the lineage so far.
        incarnations: likewise.
    """

    def __init__(
        self, job: OpenJob, partition: Partition, lineage: Sequence[Stretch], changes: Sequence[Settings]
    ) -> None:
        self._job = job
        self._partition = partition
        self._changes = changes
        self._where = f"server {partition.number}'s journal"
        self._origins = Counter(stretch.origin for stretch in lineage)  # incarnations still to go on from each
        self._saved: dict[str, ServerState] = {}  # by checkpoint: those that are in use
        self._origin: ServerState  # of the incarnation that is about to fork
        self._given_up = False  # the rest of its branch is skipped
        self._skipped: list[int] = []  # places of records
        self._readers = Counter[Version]()  # of each version, still to come
        self._kept: dict[Version, FloatArray] = {}  # what workers were shown, while a gradient of it is still to come
        self._senders: dict[tuple[int, bytes, int], PartSender] = {}  # by session, worker and slot
        self._nothing = np.zeros(partition.stop - partition.start, np.float32)
        self.number = partition.number
        self.slice = slice(partition.start, partition.stop)
        self.on_lineage = False
        self.place = -1
        self.updates = 0
        self.pushes = 0
        self.incarnations = 0
        self.end: tuple[int, FloatArray] | None = None
        self.next: Record | None = None
        self._records = self._play(lineage)

    def _play(self, lineage: Sequence[Stretch]) -> Iterator[Record]:
        """Yield the records to replay; what has to happen between two of them happens here."""
        *_, last = (segment for stretch in lineage for segment in stretch.segments if segment.kept)
        for stretch in lineage:
            self._begin(stretch)
            for segment in stretch.segments:
                yield from self._segment_records(segment)
                if segment.checkpoint in self._origins and not self._given_up:
                    self._saved[segment.checkpoint] = self._state()
                if segment is last:
                    self.end = self.updates, self.weights

    def _segment_records(self, segment: Segment) -> Iterator[Record]:
        self._segment = segment
        for record in Record.of(segment.records):
            self.place += 1
            if self._given_up and not segment.kept:
                self._skipped.append(self.place)
            else:
                yield record

    def _begin(self, stretch: Stretch) -> None:
        """Begin an incarnation: with the initial weights, or with a checkpoint's state, from which it is to fork."""
        origin = stretch.origin
        self._stretch = stretch
        self._given_up = origin is not None and origin not in self._saved
        self._senders = {key: sender for key, sender in self._senders.items() if key[0] == stretch.session}
        if origin is None:
            weights = self._job.weights[self.slice]
            version = Version(stretch.incarnation, 0)
            self._server = ParameterServer(self._spec(), self._partition, weights, self._job.shards.grid, version)
            self._note(stretch.kept)
            self.incarnations += stretch.kept
        elif self._given_up:
            if stretch.kept:
                raise JournalError(
                    f"{self._where} goes on from checkpoint {origin}, and has no segment that ends there. Restore what "
                    "was deleted"
                )
        else:
            self._origins[origin] -= 1
            self._origin = self._saved[origin] if self._origins[origin] else self._saved.pop(origin)
            if not any(len(segment.records) for segment in stretch.segments):  # they were lost, the state is known
                self._fork(0.0)
                self._note(kept=False)

    def _state(self) -> ServerState:
        """Return what the checkpoint holds at which the server has arrived."""
        if not self._server.can_save:
            raise ReplayError(
                f"record {self.place} of {self._where} is the last before a checkpoint, and the replay is in the "
                "middle of a round there, which no checkpoint can be. Records before it are missing or another run's"
            )
        return self._server.state()

    def start(self) -> None:
        """Come to the first record; every version that will be read is to be expected before."""
        self._turn()

    def _turn(self) -> None:
        self.next = next(self._records, None)

    def _spec(self) -> JobSpec:
        """The job as the present incarnation was given it."""
        spec = self._job.spec
        workers = self._stretch.workers
        if workers is None:
            return spec
        scaling = ScalingConfig.model_validate(spec.scaling.model_dump() | {"workers": workers})
        return spec.model_copy(update={"scaling": scaling})

    @property
    def weights(self) -> FloatArray:
        """A copy of its weights, `[partition size]`."""
        return self._server.weights

    @property
    def astray(self) -> bool:
        """Return True if the next record is of a branch that was given up."""
        return self.next is not None and not self._segment.kept

    def give_up(self) -> list[int]:
        """Leave the branch that the next record is of; return the places of its records that are not replayed."""
        self._given_up = True
        self._skipped = [self.place]
        self._turn()
        return self._skipped

    # Versions that are read

    def expect(self, read: Version) -> None:
        """Keep this version once it comes: a gradient was computed from it."""
        self._readers[read] += 1

    def shown(self, version: Version) -> FloatArray | None:
        """Return what workers were shown at that version; None: it did not come yet."""
        return self._kept.get(version)

    def has_passed(self, version: Version) -> bool:
        """Return True if that version can no longer come."""
        return self.next is None or self._stretch.incarnation > version.incarnation

    def forget(self, read: Version) -> None:
        """Count off a gradient of this version: it is computed, or never will be."""
        self._readers[read] -= 1
        if not self._readers[read]:
            del self._readers[read]
            self._kept.pop(read, None)

    def _keep(self) -> None:
        """Keep the weights that workers are shown now, if a gradient of them is to come."""
        version = self._server.version
        if version not in self._kept and self._readers[version]:
            self._kept[version] = self._server.published.copy()

    # Records

    def again(self, record: Record, computed: Computed | None) -> None:
        """Let the next record happen.

        Args:
            record: which.
            computed: the gradient, of a push that was taken.

        Raises:
            ReplayError: it came out otherwise than in the run.
        """
        worker = record.worker
        now = record.now
        match record.kind:
            case RecordKind.FORK:
                self._fork(now)
            case RecordKind.JOIN:
                self._server.join(worker, now)
            case RecordKind.LEAVE:
                self._server.leave(worker, now)
            case RecordKind.CHANGE:
                self._server.change(self._settings(record), now)
            case RecordKind.SKIP:
                self._server.skip(record.batch, record.examples, now)
            case RecordKind.PUSH:
                self._server.push(self._cut(record, computed) if computed else self._refused(record), now)
                self.pushes += self._segment.kept
        self._compare(record)
        self._note(self._segment.kept)
        self._turn()

    def _note(self, kept: bool) -> None:
        """Note how far the server has come."""
        self.on_lineage = kept
        if kept:
            self.updates = self._server.version.updates
        self._keep()

    def knows_remainder(self, record: Record) -> bool:
        """Return True if the push that this one carries on was replayed, or if it carries on none."""
        sender = self._senders.get(self._key(record))
        return record.carries in (0, *((sender.number, sender.carries) if sender else ()))

    def _key(self, record: Record) -> tuple[int, bytes, int]:
        return self._stretch.session, record.name, record.slot

    def _cut(self, record: Record, computed: Computed) -> Gradient:
        """Cut what this server was sent out of a gradient, as its worker did."""
        job = self._job
        key = self._key(record)
        sender = self._senders.get(key)
        if sender is None:
            sender = PartSender(self.number, self.slice, job.layout.num_trainable, job.spec.worker_options)
            self._senders[key] = sender
        came_late = record.number < sender.number  # after its worker had given it up, and pushed the next
        if came_late:
            sender = deepcopy(sender)
        if sender.number:
            sender.settle(taken=not came_late and record.carries == sender.number)
        values, weights, reads, loss, norm = computed
        whole = self._gradient(record, values, loss, norm)
        return sender.cut(whole, values, weights, reads)

    def _refused(self, record: Record) -> Gradient:
        """Return a gradient that comes out as that record: of what is refused only finiteness is looked at."""
        norm = nan if record.outcome is Outcome.REJECTED else 0.0
        gradient = self._gradient(record, self._nothing, 0.0, norm)
        others = tuple(Version(*other) for other in record.others)
        return gradient._replace(weights_read=self._nothing, others=others, carries=record.carries)

    @staticmethod
    def _gradient(record: Record, values: FloatArray, loss: float, norm: float) -> Gradient:
        of = record.slot, record.number, record.batch, record.examples, record.read
        return Gradient(record.worker, *of, values, loss, norm, record.compute_s)

    def _compare(self, record: Record) -> None:
        """The server's own record of it must be the same, but for what only the run could measure."""
        (made,) = Record.of(self._server.journal.take()[-1:])
        if made._replace(loss=record.loss, compute_s=record.compute_s) != record:
            raise ReplayError(
                f"{self.told}; the replay came to {made}. Records before it are missing or another run's, or psgd or "
                "its libraries are not those of env.json"
            )

    @property
    def told(self) -> str:
        """What the next record says, for messages."""
        return f"record {self.place} of {self._where} is {self.next}"

    def _fork(self, now: float) -> None:
        """A new incarnation, from the state that the server had at its checkpoint."""
        state = self._origin
        incarnation = self._stretch.incarnation
        spec = self._spec().model_copy(update=dict(Settings.model_validate(state.metadata["settings"])))
        self._server = ParameterServer.restore(spec, self._job.shards.grid, state, incarnation, now)
        self.incarnations += self._stretch.kept

    def _settings(self, record: Record) -> Settings:
        if record.place >= len(self._changes):
            raise JournalError(
                f"record {self.place} of {self._where} is a change to settings {record.place}, and the checkpoint "
                f"tells of {len(self._changes)}: the journal is another run's. Restore it"
            )
        return self._changes[record.place]
