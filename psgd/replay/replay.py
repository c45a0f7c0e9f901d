"""Replay: recomputes a run in one process from its job, data and journal, to compare its weights bit for bit.

Seeds decide everything in a run except the order in which each server handles its pushes, and the journals record this
order. Each record is applied to a `ParameterServer` again. The gradient of a push is recomputed from the batch and the
versions that the record names, plus the remainder that compression left out of the earlier push that it names. Sums of
floats depend on their order. The bits are therefore the same only with the software of `env.json` and with the number
of BLAS threads that a worker had.

A server that is lost loses the records that it made after its last checkpoint. Two inputs can then not be recomputed:
gradients that other servers used and that were computed from the lost versions, and the remainders of lost pushes that
workers add to later ones. A replay that needs one of these inputs ends there with an error that names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from psgd.core.server.journal import RecordKind
from psgd.errors import CheckpointError, DataError, JournalError, ModelError, UntrustedRunError
from psgd.job import OpenJob
from psgd.replay.lineage import read_lineage
from psgd.replay.pushes import Pushes
from psgd.replay.replayer import Replayer
from psgd.replay.server import ReplayServer
from psgd.spec import JobSpec
from psgd.store.checkpoints import Checkpoints
from psgd.store.manifest import Manifest
from psgd.store.run_directory import RunDirectory
from psgd.store.storage import Storage
from psgd_workers.counting import counted
from psgd_workers.gradients.layout import Layout
from psgd_workers.messages import BatchId, FloatArray
from psgd_workers.spec import LinearModel, MlpModel, NoCompression

__all__ = ["Replay", "replay"]


@dataclass(frozen=True, slots=True)
class Replay:
    """The result of a replay."""

    run: str  # directory of the run
    checkpoint: str  # name of the checkpoint whose lineage was replayed
    updates: int  # number of updates in the replayed weights
    pushes: int  # number of pushes replayed, with any outcome
    incarnations: int  # number of incarnations replayed, without abandoned ones
    agrees: bool | None  # True if the weights equal the checkpoint's, bit for bit; None: the replay stopped before it
    largest_difference: float  # to the checkpoint's weights, absolute; inf if only one of two values is finite
    tensor: str | None  # name of the tensor with the largest difference; None: there is no difference
    seconds: float  # duration of the replay

    def __str__(self) -> str:
        """Return the result in one line, for people."""
        pushes = f"{counted(self.pushes, 'push', 'pushes')} of {counted(self.incarnations, 'incarnation')}"
        counts = f"{pushes}, {counted(self.updates, 'update')}"
        match self.agrees:
            case True:
                verdict = f"checkpoint {self.checkpoint} agrees bit for bit"
            case False:
                difference = f"differs by up to {self.largest_difference:.3g}, in {self.tensor}"
                verdict = f"checkpoint {self.checkpoint} {difference}"
            case None:
                verdict = f"stopped before checkpoint {self.checkpoint}"
        return f"{self.run}: {verdict}; {counts}, replayed in {self.seconds:.1f} s"

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain values, in the order of `psgd replay --json`."""
        return asdict(self)


def replay(run: RunDirectory, *, until: int | None = None, out: Path | None = None, trust: bool = False) -> Replay:
    """Recompute a run up to its newest checkpoint, and compare the weights.

    Args:
        run: the run directory; it is only read.
        until: number of updates at which each server stops. None: the newest checkpoint.
        out: file for the replayed weights, as safetensors with the names of the model's tensors. None: no file.
        trust: True to execute the code that the run names as its model, although the run belongs to another user.

    Raises:
        UntrustedRunError: the run belongs to another user and names code as its model. Nothing was executed.
        InputError: the run does not exist, or its data, model or journal has changed since the training.
        CheckpointError: the run has no usable checkpoint.
        ReplayError: a record comes out differently than in the run.
    """
    began = perf_counter()
    spec = run.read_spec()
    if not trust:
        _check_trust(run, spec)
    checkpoint = Checkpoints(run.storage).newest(refused=lambda _: None)
    if checkpoint is None:
        raise CheckpointError(f"{run.storage.url} holds no committed checkpoint, and so there is nothing to replay")
    manifest = checkpoint.manifest
    job = OpenJob.open(spec)
    _check(run, job, manifest, until)
    states = [checkpoint.state(partition) for partition in range(manifest.partitions)]
    # Abandoned branches are needed in two cases: other servers used gradients computed from them, or workers keep what
    # compression left out.
    branches = manifest.partitions > 1 or not isinstance(spec.compression, NoCompression)
    lineages = [read_lineage(run, manifest, partition, branches) for partition in range(manifest.partitions)]
    for segment in (segment for lineage in lineages for journal in lineage for segment in journal.segments):
        _check_batches(run, job, segment.records)
    servers = [
        ReplayServer(job, state.partition, lineage, state.changes)
        for state, lineage in zip(states, lineages, strict=True)
    ]
    with np.errstate(over="ignore", invalid="ignore"):
        updates, weights = Replayer(job, servers, Pushes(lineages)).run(until)
    saved = [state.version.updates for state in states]
    if until is None and updates != saved:
        raise JournalError(
            f"the journal of {run.storage.url} ends at {_list(updates)} updates, but checkpoint {manifest.name} has "
            f"{_list(saved)}: records are missing. Restore the journal"
        )
    if out is not None:
        Storage(str(out.absolute().parent)).write(out.name, save(job.layout.views(weights)))
    reached = updates == saved
    difference, tensor = _difference(job.layout, weights, checkpoint.weights()) if reached else (0.0, None)
    return Replay(
        run=run.storage.url,
        checkpoint=manifest.name,
        updates=min(updates),
        pushes=max(server.pushes for server in servers),
        incarnations=max(server.incarnations for server in servers),
        agrees=tensor is None if reached else None,
        largest_difference=difference,
        tensor=tensor,
        seconds=perf_counter() - began,
    )


def _check_trust(run: RunDirectory, spec: JobSpec) -> None:
    """Refuse to execute code that the run of another user names. psgd's own models need no trust."""
    if isinstance(spec.model, LinearModel | MlpModel):
        return
    user = run.foreign_user
    if user is not None:
        raise UntrustedRunError(
            f"{run.storage.url} belongs to {user}, and its resolved.json names the factory {spec.model.path!r}, which "
            "a replay would execute as you. If you trust that code, give --trust (in Python, trust=True)"
        )


def _check(run: RunDirectory, job: OpenJob, manifest: Manifest, until: int | None) -> None:
    """Raise an error if the data or the model has changed, or if `until` is beyond the checkpoint."""
    url = run.storage.url
    if manifest.data_fingerprint != job.dataset.fingerprint:
        raise DataError(
            f"the data of {url} has changed since the training: its fingerprint is {job.dataset.fingerprint}, and the "
            f"checkpoint's is {manifest.data_fingerprint}. Restore the data"
        )
    if manifest.layout != job.layout:
        raise ModelError(f"the model of {url} has other tensors than the model that was trained: restore its code")
    if until is not None and until > manifest.updates:
        raise JournalError(
            f"--until {until}: the newest checkpoint of {url} has {counted(manifest.updates, 'update')}: give "
            "at most that many"
        )


def _check_batches(run: RunDirectory, job: OpenJob, segment: NDArray[np.void]) -> None:
    """Raise an error if a push is of a batch that the job does not have."""
    sizes = np.array(job.shards.grid.batches_per_shard)
    pushes = segment[segment["kind"] == RecordKind.PUSH]
    known = pushes["shard"] < len(sizes)
    known &= pushes["index"] < sizes[np.minimum(pushes["shard"], len(sizes) - 1)]
    if not known.all():
        batch = BatchId(*pushes[~known][["epoch", "shard", "index"]][0].tolist())
        raise JournalError(
            f"the journal of {run.storage.url} names {batch.text}, which its job does not have: the journal belongs to "
            "another run. Restore it"
        )


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _difference(layout: Layout, replayed: FloatArray, saved: FloatArray) -> tuple[float, str | None]:
    """Return the largest absolute difference and its tensor, or (0, None) if all bits are the same."""
    differences: dict[str, float] = {}
    with np.errstate(over="ignore", invalid="ignore"):
        for name, values in layout.views(replayed).items():
            expected = layout.views(saved)[name]
            if values.tobytes() != expected.tobytes():
                differ = values.view(np.uint32) != expected.view(np.uint32)
                distances = np.abs(values[differ].astype(np.float64) - expected[differ])
                differences[name] = float(np.where(np.isnan(distances), inf, distances).max())
    tensor = max(differences, key=lambda name: differences[name], default=None)
    return (0.0 if tensor is None else differences[tensor]), tensor
