"""One server of a replay. It replays its journal, and keeps weights from which gradients are yet to be computed."""

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
from psgd.replay.lineage import IncarnationJournal, Record, Segment
from psgd.spec import JobSpec, ScalingConfig, Settings
from psgd_workers.gradients.sender import PartSender
from psgd_workers.messages import FloatArray, Gradient, Outcome, Version

__all__ = ["ComputedGradient", "ReplayServer"]


class ComputedGradient(NamedTuple):
    """A gradient, and the weights that it was computed from."""

    values: FloatArray  # [num_parameters]
    weights: FloatArray  # [num_parameters]
    reads: Sequence[Version]  # versions of the weights, by partition
    loss: float
    norm: float  # `gradient_norm` of the values


class ReplayServer:
    """One server, which replays the records of its journal one after another.

    An abandoned branch is replayed to its end, or until `leave_branch`. Then the server continues from the state that
    it had at the checkpoint where the branch begins.

    Args:
        job: job of the run.
        partition: partition of the server.
        lineage: journals of the server's incarnations, oldest first.
        changes: settings that the records of kind CHANGE refer to by their index.

    Attributes:
        number: number of the partition.
        slice: the partition's slice of the weights.
        position: position of the next record among all records of the lineage.
        next: the next record. None: there is none, or `start` was not called yet.
        on_lineage: True if the current weights belong to the lineage and not to an abandoned branch.
        updates: number of updates in the newest state of the lineage so far.
        end: number of updates and weights at the end of the lineage. None: the end is not reached yet.
        pushes: number of pushes of the lineage replayed so far.
        incarnations: number of incarnations of the lineage begun so far.
    """

    def __init__(
        self, job: OpenJob, partition: Partition, lineage: Sequence[IncarnationJournal], changes: Sequence[Settings]
    ) -> None:
        self._job = job
        self._partition = partition
        self._changes = changes
        self._name = f"server {partition.number}'s journal"
        self._forks_left = Counter(journal.origin for journal in lineage)  # incarnations yet to begin, by checkpoint
        self._saved: dict[str, ServerState] = {}  # states by checkpoint, while incarnations are yet to begin there
        self._origin: ServerState  # state from which the incarnation is about to fork
        self._skips_branch = False  # True while the rest of an abandoned branch is skipped
        self._skipped: list[int] = []  # positions of the skipped records
        self._pending_reads = Counter[Version]()  # number of gradients yet to be computed from each version
        self._kept: dict[Version, FloatArray] = {}  # published weights from which gradients are yet to be computed
        self._senders: dict[tuple[int, bytes, int], PartSender] = {}  # by session, worker and slot
        self._zeros = np.zeros(partition.stop - partition.start, np.float32)
        self.number = partition.number
        self.slice = slice(partition.start, partition.stop)
        self.on_lineage = False
        self.position = -1
        self.updates = 0
        self.pushes = 0
        self.incarnations = 0
        self.end: tuple[int, FloatArray] | None = None
        self.next: Record | None = None
        self._records = self._iterate(lineage)

    def _iterate(self, lineage: Sequence[IncarnationJournal]) -> Iterator[Record]:
        """Yield the records to replay. Begin incarnations and save states at checkpoints between them."""
        *_, last = (segment for journal in lineage for segment in journal.segments if segment.in_lineage)
        for journal in lineage:
            self._begin(journal)
            for segment in journal.segments:
                yield from self._segment_records(segment)
                if segment.checkpoint in self._forks_left and not self._skips_branch:
                    self._saved[segment.checkpoint] = self._state()
                if segment is last:
                    self.end = (self.updates, self.weights)

    def _segment_records(self, segment: Segment) -> Iterator[Record]:
        self._segment = segment
        for record in Record.of(segment.records):
            self.position += 1
            if self._skips_branch and not segment.in_lineage:
                self._skipped.append(self.position)
            else:
                yield record

    def _begin(self, journal: IncarnationJournal) -> None:
        """Begin an incarnation, from the initial weights or from the state at the checkpoint where it forks."""
        origin = journal.origin
        self._journal = journal
        self._skips_branch = origin is not None and origin not in self._saved
        self._senders = {key: sender for key, sender in self._senders.items() if key[0] == journal.session}
        if origin is None:
            weights = self._job.weights[self.slice]
            version = Version(journal.incarnation, 0)
            self._server = ParameterServer(self._spec(), self._partition, weights, self._job.shards.grid, version)
            self._note_state(journal.in_lineage)
            self.incarnations += journal.in_lineage
        elif self._skips_branch:
            if journal.in_lineage:
                raise JournalError(
                    f"{self._name} continues from checkpoint {origin}, but has no segment that ends there. Restore the "
                    "deleted segment"
                )
        else:
            self._forks_left[origin] -= 1
            self._origin = self._saved[origin] if self._forks_left[origin] else self._saved.pop(origin)
            if not any(len(segment.records) for segment in journal.segments):  # lost, but the first state is known
                self._fork(0.0)
                self._note_state(in_lineage=False)

    def _state(self) -> ServerState:
        """Return the current state, as the checkpoint at this point holds it."""
        if not self._server.can_save:
            raise ReplayError(
                f"record {self.position} of {self._name} is the last one before a checkpoint, but the replay is in the "
                "middle of a round there, in which no checkpoint is made. Earlier records are missing or belong to "
                "another run"
            )
        return self._server.state()

    def start(self) -> None:
        """Go to the first record. Before this, `expect` must have been called for every version that will be read."""
        self._go_to_next()

    def _go_to_next(self) -> None:
        self.next = next(self._records, None)

    def _spec(self) -> JobSpec:
        """Return the job as it was given to the current incarnation."""
        spec = self._job.spec
        workers = self._journal.workers
        if workers is None:
            return spec
        scaling = ScalingConfig.model_validate(spec.scaling.model_dump() | {"workers": workers})
        return spec.model_copy(update={"scaling": scaling})

    @property
    def weights(self) -> FloatArray:
        """Copy of the server's weights, `[partition size]`."""
        return self._server.weights

    @property
    def on_abandoned_branch(self) -> bool:
        """Return True if the next record belongs to an abandoned branch."""
        return self.next is not None and not self._segment.in_lineage

    def leave_branch(self) -> list[int]:
        """Skip the rest of the abandoned branch of the next record. Return the positions of the skipped records."""
        self._skips_branch = True
        self._skipped = [self.position]
        self._go_to_next()
        return self._skipped

    # Versions that gradients were computed from

    def expect(self, read: Version) -> None:
        """Announce a gradient that was computed from this version.

        The weights of the version are kept once the replay reaches it.
        """
        self._pending_reads[read] += 1

    def weights_at(self, version: Version) -> FloatArray | None:
        """Return the weights published at an expected version, or None if it is not reached yet."""
        return self._kept.get(version)

    def has_passed(self, version: Version) -> bool:
        """Return True if the replay can no longer reach this version."""
        return self.next is None or self._journal.incarnation > version.incarnation

    def release(self, read: Version) -> None:
        """Count off an announced gradient of this version, which was computed or is skipped."""
        self._pending_reads[read] -= 1
        if not self._pending_reads[read]:
            del self._pending_reads[read]
            self._kept.pop(read, None)

    def _keep_weights(self) -> None:
        """Keep the weights that are published now, if gradients are yet to be computed from them."""
        version = self._server.version
        if version not in self._kept and self._pending_reads[version]:
            self._kept[version] = self._server.published.copy()

    # Records

    def replay(self, record: Record, computed: ComputedGradient | None) -> None:
        """Replay the next record.

        Args:
            record: the record.
            computed: gradient of the record's push. None: the record is no push, or a push that the server refused.

        Raises:
            ReplayError: the record comes out differently than in the run.
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
                self._server.skip(record.batch, now)
            case RecordKind.PUSH:
                self._server.push(self._cut(record, computed) if computed else self._refused_gradient(record), now)
                self.pushes += self._segment.in_lineage
        self._compare(record)
        self._note_state(self._segment.in_lineage)
        self._go_to_next()

    def _note_state(self, in_lineage: bool) -> None:
        """Note the server's number of updates, and keep its weights if they are needed."""
        self.on_lineage = in_lineage
        if in_lineage:
            self.updates = self._server.version.updates
        self._keep_weights()

    def knows_remainder(self, record: Record) -> bool:
        """Return True if the remainder in this push is known, or if the push has none.

        The remainder is what compression left out of an earlier push of the same slot. It is known if that push was
        replayed.
        """
        sender = self._senders.get(self._key(record))
        return record.carries in (0, *((sender.number, sender.carries) if sender else ()))

    def _key(self, record: Record) -> tuple[int, bytes, int]:
        """Return the key of the record's sender in `_senders`."""
        return self._journal.session, record.worker_name, record.slot

    def _cut(self, record: Record, computed: ComputedGradient) -> Gradient:
        """Cut this partition's part out of a gradient, and compress it, as the worker did."""
        job = self._job
        key = self._key(record)
        sender = self._senders.get(key)
        if sender is None:
            sender = PartSender(self.number, self.slice, job.layout.num_trainable, job.spec.worker_options)
            self._senders[key] = sender
        came_late = record.number < sender.number  # its worker had abandoned it and pushed the next one
        if came_late:
            sender = deepcopy(sender)
        if sender.number:
            sender.settle(taken=not came_late and record.carries == sender.number)
        values, weights, reads, loss, norm = computed
        whole = self._gradient(record, values, loss, norm)
        return sender.cut(whole, values, weights, reads)

    def _refused_gradient(self, record: Record) -> Gradient:
        """Return a gradient that the server refuses as in the record, for which its values do not matter."""
        norm = nan if record.outcome is Outcome.REJECTED else 0.0
        gradient = self._gradient(record, self._zeros, 0.0, norm)
        others = tuple(Version(*other) for other in record.others)
        return gradient._replace(weights_read=self._zeros, others=others, carries=record.carries)

    @staticmethod
    def _gradient(record: Record, values: FloatArray, loss: float, norm: float) -> Gradient:
        return Gradient(
            record.worker,
            record.slot,
            record.number,
            record.batch,
            record.examples,
            record.read,
            values,
            loss,
            norm,
            record.compute_s,
        )

    def _compare(self, record: Record) -> None:
        """Compare a record with the one that the replay made, except for its loss and compute time.

        Raises:
            ReplayError: they differ.
        """
        (made,) = Record.of(self._server.journal.take()[-1:])
        if made._replace(loss=record.loss, compute_s=record.compute_s) != record:
            raise ReplayError(
                f"{self.description}; the replay came to {made}. Earlier records are missing or belong to another run, "
                "or psgd or its libraries have other versions than env.json says"
            )

    @property
    def description(self) -> str:
        """Description of the next record, for messages."""
        return f"record {self.position} of {self._name} is {self.next}"

    def _fork(self, now: float) -> None:
        """Start the incarnation from the state that the server had at its checkpoint."""
        state = self._origin
        incarnation = self._journal.incarnation
        spec = self._spec().model_copy(update=dict(state.settings))
        self._server = ParameterServer.restore(spec, self._job.shards.grid, state, incarnation, now)
        self.incarnations += self._journal.in_lineage

    def _settings(self, record: Record) -> Settings:
        """Return the settings to which a record of kind CHANGE refers."""
        if record.batch_index >= len(self._changes):
            raise JournalError(
                f"record {self.position} of {self._name} is a change to settings {record.batch_index}, but the "
                f"checkpoint holds only {len(self._changes)}: the journal belongs to another run. Restore it"
            )
        return self._changes[record.batch_index]
