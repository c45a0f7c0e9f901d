"""Replay: a run recomputed in one process from its job, its data and its journal, to be compared bit for bit.

The servers' order is all that is not decided by seeds, and the journal has it. Every record reaches a `ParameterServer`
again: a push with the gradient of the batch it names, at the weights of the version it read. Sums of floats depend on
their order, so the bits are the same only with the software of `env.json`, and as many BLAS threads as a worker had.

One thing the journal does not tell: a push whose receipt never reached a worker that lives. If the job compresses
gradients, that worker took it for refused, and a replay goes by what the server did.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import inf, nan
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from safetensors.numpy import save

from psgd.checkpoints import Checkpoints, Manifest
from psgd.core.journal import Kind
from psgd.core.server import ParameterServer, Partition
from psgd.errors import CheckpointError, DataError, JournalError, ModelError, ReplayError
from psgd.job import OpenJob
from psgd.jobfile import parse_spec
from psgd.monitoring.rundir import RunDirectory
from psgd.simulation.lineage import Record, Stretch, read_lineage
from psgd.spec import JobSpec, Settings
from psgd.storage import Storage
from psgd_workers.layout import Layout
from psgd_workers.messages import FloatArray, Gradient, Outcome, Version
from psgd_workers.sender import TAKEN, Sender, gradient_norm

__all__ = ["Replay", "replay"]


@dataclass(frozen=True, slots=True)
class Replay:
    """What a replay came to."""

    run: str  # its directory
    checkpoint: str  # whose lineage was replayed
    updates: int  # of the weights
    pushes: int  # replayed, whatever their outcome
    incarnations: int  # replayed, those that were given up left out
    agrees: bool | None  # with the checkpoint's weights, bit for bit; None: it stopped before their version
    largest_difference: float  # to them, absolute; inf if only one is finite
    tensor: str | None  # where that is; None: they agree
    seconds: float

    def __str__(self) -> str:
        """One line for people."""
        past = f"{self.pushes} pushes of {self.incarnations} incarnations, {self.updates} updates"
        match self.agrees:
            case True:
                told = f"checkpoint {self.checkpoint} agrees bit for bit"
            case False:
                told = f"checkpoint {self.checkpoint} differs by up to {self.largest_difference:.3g}, in {self.tensor}"
            case None:
                told = f"stopped before checkpoint {self.checkpoint}"
        return f"{self.run}: {told}; {past}, replayed in {self.seconds:.1f} s"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, in the order of `psgd replay --json`."""
        return asdict(self)


def replay(run: RunDirectory, *, until: int | None = None, out: Path | None = None) -> Replay:
    """Recompute a run up to its newest checkpoint, and compare the weights.

    Args:
        run: the run directory; it is only read.
        until: stop at this many updates.
        out: where to write the replayed weights, named, as safetensors.

    Raises:
        InputError: there is no such run, or its data or journal is not what it was trained with.
        CheckpointError: no checkpoint is whole.
        ReplayError: a record came out otherwise than in the run.
    """
    began = perf_counter()
    spec = parse_spec(run.read_json("resolved.json") or {}, f"{run.storage.url}/resolved.json")
    checkpoint = Checkpoints(run.storage).newest(refused=lambda _: None)
    if checkpoint is None:
        raise CheckpointError(f"there is no committed checkpoint in {run.storage.url}, and so nothing to replay")
    manifest, job = checkpoint.manifest, OpenJob.open(spec)
    _check(run, job, manifest, until)
    lineage = read_lineage(run, manifest)
    _check_batches(run, job, lineage)
    state = checkpoint.state(0)
    changes = [Settings.model_validate(settings) for settings in state.facts["changes"]]
    player = _Player(job, lineage, changes)
    with np.errstate(over="ignore", invalid="ignore"):
        player.play(until)
    weights, updates = player.server.weights, player.server.version.updates
    if until is None and updates != manifest.updates:
        raise JournalError(
            f"the journal of {run.storage.url} ends at {updates} updates, and checkpoint {manifest.name} has "
            f"{manifest.updates}: records are missing. Restore the journal"
        )
    if out is not None:
        Storage(str(out.absolute().parent)).write(out.name, save(job.layout.views(weights)))
    reached = updates == manifest.updates
    difference, tensor = _difference(job.layout, weights, state.arrays["weights"]) if reached else (0.0, None)
    return Replay(
        run=run.storage.url,
        checkpoint=manifest.name,
        updates=updates,
        pushes=player.pushes,
        incarnations=player.incarnations,
        agrees=tensor is None if reached else None,
        largest_difference=difference,
        tensor=tensor,
        seconds=perf_counter() - began,
    )


def _check(run: RunDirectory, job: OpenJob, manifest: Manifest, until: int | None) -> None:
    """Refuse what cannot come out the same."""
    url = run.storage.url
    if manifest.data_fingerprint != job.dataset.fingerprint:
        raise DataError(
            f"the data of {url} is not what it was trained on: its fingerprint is {job.dataset.fingerprint}, and the "
            f"checkpoint's {manifest.data_fingerprint}. Restore the data"
        )
    if manifest.layout != job.layout:
        raise ModelError(f"the model of {url} has other tensors than it was trained with: restore its code")
    if manifest.partitions != 1:
        raise JournalError(
            f"{url} was trained on {manifest.partitions} servers, each with a journal of its own, and a replay can do "
            "one: compare runs of scaling.servers 1"
        )
    if until is not None and until > manifest.updates:
        raise JournalError(f"--until {until}: the journal of {url} is committed up to {manifest.updates} updates")


def _check_batches(run: RunDirectory, job: OpenJob, lineage: Sequence[Stretch]) -> None:
    sizes = np.array(job.shards.grid.batches_per_shard)
    for segment in (segment for stretch in lineage for segment in stretch.segments):
        pushes = segment[segment["kind"] == Kind.PUSH]
        known = pushes["shard"] < len(sizes)
        known &= pushes["index"] < sizes[np.minimum(pushes["shard"], len(sizes) - 1)]
        if not known.all():
            epoch, shard, index = pushes[~known][["epoch", "shard", "index"]][0].tolist()
            raise JournalError(
                f"the journal of {run.storage.url} tells of batch {index} of shard {shard} in epoch {epoch}, which "
                "its job does not have: it is another run's. Restore the journal"
            )


class _Player:
    """The run's server once more, and what its workers sent it.

    Args:
        job: of the run.
        lineage: what happened.
        changes: the settings that its records of changes number.

    Attributes:
        server: as far as it has come.
        pushes: so far.
        incarnations: so far.
    """

    def __init__(self, job: OpenJob, lineage: Sequence[Stretch], changes: Sequence[Settings]) -> None:
        self._job = job
        self._lineage = lineage
        self._changes = changes
        self._worker = job.worker("replay")  # computes for all of them: a gradient is a function of batch and weights
        self._senders: dict[str, Sender] = {}
        self._readers = Counter(_reads(lineage))  # of each version, still to come
        self._kept: dict[Version, FloatArray] = {}  # what workers were shown, while somebody still reads it
        self._refused = np.zeros_like(job.weights)  # stands for what is refused: nobody looks at its values
        self.server = self._new_server(lineage[0])
        self.pushes = 0
        self.incarnations = 1

    def _new_server(self, stretch: Stretch) -> ParameterServer:
        job, size = self._job, self._job.layout.num_parameters
        partition = Partition(0, 0, size, job.layout.num_trainable)
        version = Version(stretch.incarnation, 0)
        return ParameterServer(self._spec(stretch), partition, job.weights, job.shards.grid, version)

    def _spec(self, stretch: Stretch) -> JobSpec:
        """The job as that incarnation was given it."""
        spec = self._job.spec
        if stretch.workers is None:
            return spec
        return spec.model_copy(update={"scaling": spec.scaling.model_copy(update={"workers": stretch.workers})})

    def play(self, until: int | None) -> None:
        """Go through the lineage, to its end or to a number of updates.

        Raises:
            ReplayError: at the first record that comes out otherwise.
        """
        self._keep()
        number = 0
        for stretch in self._lineage:
            for record in stretch.records():
                if until is not None and self.server.version.updates >= until:
                    return
                self._again(record, number, stretch)
                number += 1

    def _again(self, record: Record, number: int, stretch: Stretch) -> None:
        worker, now = record.worker, record.now
        match record.kind:
            case Kind.FORK:
                self._fork(stretch, number, now)
            case Kind.JOIN:
                self.server.join(worker, now)
            case Kind.LEAVE:
                self.server.leave(worker, now)
            case Kind.CHANGE:
                self.server.change(self._settings(record, number), now)
            case Kind.PUSH:
                self.server.push(self._gradient(record, number), now)
                self.pushes += 1
        self._compare(record, number)
        if record.kind == Kind.PUSH and record.outcome in TAKEN:
            self._senders[worker].settle([record.outcome])
        self._keep()

    def _compare(self, record: Record, number: int) -> None:
        """The server's own record of it must be the same, but for what only the run could measure."""
        made = Record._make(self.server.journal.take().tolist()[-1])
        if made[:-2] != record[:-2]:
            raise ReplayError(
                f"record {number} of the journal is {record}; the replay came to {made}. Records before it are "
                "missing or another run's, or psgd or its libraries are not those of env.json"
            )

    def _keep(self) -> None:
        """Keep the weights that workers are shown now, if somebody will push what he made of them."""
        version = self.server.version
        if self._readers[version] and version not in self._kept:
            self._kept[version] = self.server.published.copy()

    def _fork(self, stretch: Stretch, number: int, now: float) -> None:
        """A new incarnation, from the state that the one before it saved there."""
        if not self.server.can_save:
            raise ReplayError(
                f"record {number} of the journal is a fork, and the replay is in the middle of a round there, which no "
                "checkpoint can be. Records before it are missing or another run's"
            )
        state = self.server.state()
        spec = self._spec(stretch).model_copy(update=dict(self.server.settings))
        self.server = ParameterServer.restore(spec, self._job.shards.grid, state, stretch.incarnation, now)
        self.incarnations += 1
        self._senders = {}  # its workers are new, even if they bear old names

    def _settings(self, record: Record, number: int) -> Settings:
        if record.place >= len(self._changes):
            raise JournalError(
                f"record {number} of the journal is a change to settings {record.place}, and the checkpoint tells of "
                f"{len(self._changes)}: the journal is another run's. Restore it"
            )
        return self._changes[record.place]

    def _gradient(self, record: Record, number: int) -> Gradient:
        """What the worker pushed. What is refused needs no values: only whether they were finite is looked at."""
        worker, batch, read = record.worker, record.batch, record.read
        if record.outcome not in TAKEN:
            norm = nan if record.outcome is Outcome.REJECTED else 0.0
            nothing = self._refused
            return Gradient(
                worker, batch, record.examples, read, nothing, 0.0, norm, record.compute_s, weights_read=nothing
            )
        weights = self._read(record, number)
        values = np.empty_like(weights)
        loss = self._worker.gradient(batch, weights, values)
        norm = gradient_norm(values, self._job.layout.num_trainable)
        if worker not in self._senders:
            layout, rules = self._job.layout, self._job.spec.rules
            self._senders[worker] = Sender(worker, [slice(0, len(values))], layout.num_trainable, rules)
        (gradient,) = self._senders[worker].gradients(
            batch, record.examples, [read], values, weights, loss, norm, record.compute_s
        )
        return gradient

    def _read(self, record: Record, number: int) -> FloatArray:
        weights = self._kept.get(record.read)
        if weights is None:
            raise ReplayError(
                f"record {number} of the journal is {record}; the replay never came to the version it read. Records "
                "before it are missing or another run's"
            )
        self._readers[record.read] -= 1
        if not self._readers[record.read]:
            del self._kept[record.read]
        return weights


def _reads(lineage: Sequence[Stretch]) -> Iterator[Version]:
    """The versions that gradients in the weights were computed from."""
    return (
        record.read
        for stretch in lineage
        for record in stretch.records()
        if record.kind == Kind.PUSH and record.outcome in TAKEN
    )


def _difference(layout: Layout, replayed: FloatArray, saved: FloatArray) -> tuple[float, str | None]:
    """The largest one and its tensor; (0, None) if all bits are the same."""
    found: dict[str, float] = {}
    with np.errstate(over="ignore", invalid="ignore"):
        for name, mine in layout.views(replayed).items():
            theirs = layout.views(saved)[name]
            if mine.tobytes() != theirs.tobytes():
                differ = mine.view(np.uint32) != theirs.view(np.uint32)
                distances = np.abs(mine[differ].astype(np.float64) - theirs[differ])
                found[name] = float(np.where(np.isnan(distances), inf, distances).max())
    tensor = max(found, key=lambda name: found[name], default=None)
    return (0.0 if tensor is None else found[tensor]), tensor
