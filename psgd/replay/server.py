"""One server of a replay: it goes through its journal, and keeps what is still to be read of its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import nan

import numpy as np

from psgd.core.server.journal import RecordKind
from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.partitions import Partition
from psgd.errors import JournalError, ReplayError
from psgd.job import OpenJob
from psgd.replay.lineage import Record, Stretch
from psgd.spec import JobSpec, ScalingConfig, Settings
from psgd_workers.messages import FloatArray, Gradient, Outcome, Version

__all__ = ["ReplayServer"]


class ReplayServer:
    """One server, which goes through its journal.

    Args:
        job: of the run.
        partition: of the weights.
        lineage: what happened.
        changes: the settings that its records of changes number.

    Attributes:
        number: of the partition.
        slice: of the weights.
        place: of the next record.
        next: that record; None: there is none.
        pushes: so far.
        incarnations: so far.
    """

    def __init__(
        self, job: OpenJob, partition: Partition, lineage: Sequence[Stretch], changes: Sequence[Settings]
    ) -> None:
        self._job = job
        self._changes = changes
        self._where = f"server {partition.number}'s journal"
        self._records = ((stretch, record) for stretch in lineage for record in stretch.records())
        self._stretch = lineage[0]
        self._readers = Counter[Version]()  # of each version, still to come
        self._searched: dict[int, Version] = {}  # push -> the oldest version that it may have read
        self._kept: dict[Version, FloatArray] = {}  # what workers were shown, while somebody still reads it
        self._nothing = np.zeros(partition.stop - partition.start, np.float32)
        weights = job.weights[partition.start : partition.stop]
        version = Version(self._stretch.incarnation, 0)
        self._server = ParameterServer(self._spec(), partition, weights, job.shards.grid, version)
        self.number = partition.number
        self.slice = slice(partition.start, partition.stop)
        self.place = -1
        self.pushes = 0
        self.incarnations = 1
        self._turn()

    def _turn(self) -> None:
        self.next: Record | None
        self._stretch, self.next = next(self._records, (self._stretch, None))
        self.place += 1

    def _spec(self) -> JobSpec:
        """The job as the present incarnation was given it."""
        spec = self._job.spec
        workers = self._stretch.workers
        if workers is None:
            return spec
        scaling = ScalingConfig.model_validate(spec.scaling.model_dump() | {"workers": workers})
        return spec.model_copy(update={"scaling": scaling})

    @property
    def version(self) -> Version:
        """How far it has come."""
        return self._server.version

    @property
    def weights(self) -> FloatArray:
        """A copy of its weights, `[partition size]`."""
        return self._server.weights

    # Versions that are read

    def expect(self, read: Version) -> None:
        """A gradient to come was computed from this version."""
        self._readers[read] += 1

    def search(self, push: int, oldest: Version) -> None:
        """A gradient to come was computed from this version, or a later one of its incarnation: nobody knows which."""
        self._searched[push] = oldest

    def _wanted(self, version: Version) -> bool:
        return self._readers[version] > 0 or any(
            version >= oldest and version.incarnation == oldest.incarnation for oldest in self._searched.values()
        )

    def keep(self) -> None:
        """Keep the weights that workers are shown now, if somebody will push what he made of them."""
        version = self._server.version
        if version not in self._kept and self._wanted(version):
            self._kept[version] = self._server.published.copy()

    def shown(self, version: Version) -> FloatArray | None:
        """What workers were shown at that version; None: it did not come yet."""
        return self._kept.get(version)

    def candidates(self, push: int) -> list[Version]:
        """The versions that came so far and that a push may have read, oldest first."""
        oldest = self._searched[push]
        return sorted(v for v in self._kept if v >= oldest and v.incarnation == oldest.incarnation)

    def forget(self, push: int, read: Version) -> None:
        """That gradient is computed, from this version."""
        if self._searched.pop(push, None) is None:
            self._readers[read] -= 1
            stale = [read]
        else:
            stale = list(self._kept)
        for version in stale:
            if not self._wanted(version):
                del self._kept[version]

    # Records

    def again(self, record: Record, gradient: Gradient | None) -> None:
        """Let the next record happen; a push with its gradient.

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
            case RecordKind.PUSH:
                assert gradient is not None
                self._server.push(gradient, now)
                self.pushes += 1
        self._compare(record)
        self.keep()
        self._turn()

    def refused(self, record: Record) -> Gradient:
        """What is refused needs no values: only whether they were finite is looked at."""
        norm = nan if record.outcome is Outcome.REJECTED else 0.0
        values = self._nothing
        return Gradient(
            record.worker,
            record.batch,
            record.examples,
            record.read,
            values,
            0.0,
            norm,
            record.compute_s,
            weights_read=values,
        )

    def _compare(self, record: Record) -> None:
        """The server's own record of it must be the same, but for what only the run could measure."""
        made = Record._make(self._server.journal.take().tolist()[-1])
        if made[:-2] != record[:-2]:
            raise ReplayError(
                f"{self.told}; the replay came to {made}. Records before it are missing or another run's, or psgd or "
                "its libraries are not those of env.json"
            )

    @property
    def told(self) -> str:
        """What the next record says, for messages."""
        return f"record {self.place} of {self._where} is {self.next}"

    def _fork(self, now: float) -> None:
        """A new incarnation, from the state that the one before it saved there."""
        if not self._server.can_save:
            raise ReplayError(
                f"record {self.place} of {self._where} is a fork, and the replay is in the middle of a round there, "
                "which no checkpoint can be. Records before it are missing or another run's"
            )
        state = self._server.state()
        incarnation = self._stretch.incarnation
        spec = self._spec().model_copy(update=dict(self._server.settings))
        self._server = ParameterServer.restore(spec, self._job.shards.grid, state, incarnation, now)
        self.incarnations += 1

    def _settings(self, record: Record) -> Settings:
        if record.place >= len(self._changes):
            raise JournalError(
                f"record {self.place} of {self._where} is a change to settings {record.place}, and the checkpoint "
                f"tells of {len(self._changes)}: the journal is another run's. Restore it"
            )
        return self._changes[record.place]
