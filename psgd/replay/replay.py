"""Replay: a run recomputed in one process from its job, its data and its journal, to be compared bit for bit.

The servers' orders are all that is not decided by seeds, and their journals have them. Every record reaches a
`ParameterServer` again: a push with the gradient of the batch it names, at the weights of the versions it read, and
with what compression left out of the push that it carries on. Sums of floats depend on their order, so the bits are the
same only with the software of `env.json`, and as many BLAS threads as a worker had.

A lost server takes along the records since its last checkpoint. What others took of it meanwhile cannot be computed
again: gradients read from those versions by living servers, and the remainders of pushes that living workers carry on.
A replay that comes to one of them ends there, and says so.
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
from psgd.core.server.partitions import Partition
from psgd.core.server.state import ServerState
from psgd.errors import CheckpointError, DataError, JournalError, ModelError
from psgd.job import OpenJob
from psgd.replay.lineage import Stretch, read_lineage
from psgd.replay.pushes import Pushes
from psgd.replay.replayer import Replayer
from psgd.replay.server import ReplayServer
from psgd.spec import Settings
from psgd.store.checkpoints import Checkpoints, Manifest
from psgd.store.run_directory import RunDirectory
from psgd.store.storage import Storage
from psgd_workers.gradients.layout import Layout
from psgd_workers.messages import FloatArray
from psgd_workers.spec import NoCompression

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
        until: stop once every server has made so many updates, each with the weights it has then.
        out: where to write the replayed weights, named, as safetensors.

    Raises:
        InputError: there is no such run, or its data or journal is not what it was trained with.
        CheckpointError: no checkpoint is whole.
        ReplayError: a record came out otherwise than in the run.
    """
    began = perf_counter()
    spec = run.read_spec()
    checkpoint = Checkpoints(run.storage).newest(refused=lambda _: None)
    if checkpoint is None:
        raise CheckpointError(f"there is no committed checkpoint in {run.storage.url}, and so nothing to replay")
    manifest = checkpoint.manifest
    job = OpenJob.open(spec)
    _check(run, job, manifest, until)
    states = [checkpoint.state(partition) for partition in range(manifest.partitions)]
    # A branch that was given up matters to other servers, and to workers that remember what they left out.
    branches = manifest.partitions > 1 or not isinstance(spec.compression, NoCompression)
    lineages = [read_lineage(run, manifest, partition, branches) for partition in range(manifest.partitions)]
    for segment in (segment for lineage in lineages for stretch in lineage for segment in stretch.segments):
        _check_batches(run, job, segment.records)
    servers = [_server(job, state, lineage) for state, lineage in zip(states, lineages, strict=True)]
    with np.errstate(over="ignore", invalid="ignore"):
        updates, weights = Replayer(job, servers, Pushes(lineages)).play(until)
    saved = [int(state.metadata["version"][1]) for state in states]
    if until is None and updates != saved:
        raise JournalError(
            f"the journal of {run.storage.url} ends at {_listed(updates)} updates, and checkpoint {manifest.name} has "
            f"{_listed(saved)}: records are missing. Restore the journal"
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
    if until is not None and until > manifest.updates:
        raise JournalError(f"--until {until}: the journal of {url} is committed up to {manifest.updates} updates")


def _check_batches(run: RunDirectory, job: OpenJob, segment: NDArray[np.void]) -> None:
    sizes = np.array(job.shards.grid.batches_per_shard)
    pushes = segment[segment["kind"] == RecordKind.PUSH]
    known = pushes["shard"] < len(sizes)
    known &= pushes["index"] < sizes[np.minimum(pushes["shard"], len(sizes) - 1)]
    if not known.all():
        epoch, shard, index = pushes[~known][["epoch", "shard", "index"]][0].tolist()
        raise JournalError(
            f"the journal of {run.storage.url} tells of batch {index} of shard {shard} in epoch {epoch}, which "
            "its job does not have: it is another run's. Restore the journal"
        )


def _server(job: OpenJob, state: ServerState, lineage: Sequence[Stretch]) -> ReplayServer:
    partition = Partition(*state.metadata["partition"])
    changes = [Settings.model_validate(settings) for settings in state.metadata["changes"]]
    return ReplayServer(job, partition, lineage, changes)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


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
