"""Preflight: everything that can be refused is refused here, once, before any training process exists."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import ray

from psgd.cluster.address import find_address
from psgd.cluster.resuming import check_checkpoint, find_checkpoint, with_settings
from psgd.cluster.session import check_room, session
from psgd.core.server.partitions import Partition, partition_weights
from psgd.errors import ClusterError, RunExistsError
from psgd.interruption import Interruption
from psgd.job import OpenJob
from psgd.monitoring.console import warn
from psgd.spec import JobSpec
from psgd.spec.reader import as_spec, parse_spec
from psgd.store.checkpoints import Checkpoint, Checkpoints
from psgd.store.owner import Owner
from psgd.store.run_directory import RunDirectory
from psgd.store.storage import Storage, location

__all__ = ["RunPlan", "preflight"]


@dataclass(frozen=True, slots=True)
class RunPlan:
    """A run that passed every check, with all it starts from.

    Attributes:
        job: the job as given, named; its data is open, and its model was tried on one batch.
        partitions: of the weights, one for each server.
        run: the run directory; its storage was probed.
        spec: the job with the settings that it continues with: those of the checkpoint.
        checkpoint: the newest that can be continued from; None: the run begins.
        owner: this driver, once it has taken the run over.
    """

    job: OpenJob
    partitions: tuple[Partition, ...]
    run: RunDirectory
    spec: JobSpec
    checkpoint: Checkpoint | None
    owner: Owner


@contextmanager
def preflight(
    spec: JobSpec | Mapping[str, Any],
    *,
    name: str | None,
    storage: str | PathLike[str] | None,
    address: str | None,
    resume: bool,
    interruption: Interruption,
) -> Iterator[RunPlan]:
    """Check the job, the storage, the data, the model and the checkpoint; then connect to Ray and take the run over.

    Args:
        spec: the job.
        name: of the run; None: the job's, else one made of the time.
        storage: folder or URL of runs; None: the job's.
        address: of a running cluster; see `find_address`.
        resume: True to continue a run that exists.
        interruption: signals that may end the checks.

    Yields:
        The plan. Ray is connected, and has room for the job, as long as the block lasts.

    Raises:
        InputError: the job cannot be run; nothing was started, and no other driver was disturbed.
        ClusterStartError: no local Ray could be started.
    """
    interruption.outlook = "nothing was started"
    spec = _named(as_spec(spec), name, None if storage is None else location(storage))
    address = _cluster(address)
    run = _open_directory(spec)
    before = run.owned_by
    _check_run(run, spec, resume)
    committed = Checkpoints(run.storage).committed()
    checkpoint = find_checkpoint(run, spec, lambda fault: _refused(run, fault))
    job = OpenJob.open(spec)
    partitions = partition_weights(job.layout.num_parameters, job.layout.num_trainable, spec.scaling.servers)
    continued = _continued(job, checkpoint)
    for warning in replace(job, spec=continued).warnings():
        warn(warning)
    with interruption.critical("Ray is stopped as soon as it has started"), session(spec, address):
        interruption.check()
        check_room(spec, job.layout.num_parameters)
        interruption.check()
        plan = RunPlan(job, partitions, run, continued, checkpoint, _own(run, before))
        yield plan if Checkpoints(run.storage).committed() == committed else _caught_up(plan)


def _named(spec: JobSpec, name: str | None, storage: str | None) -> JobSpec:
    tree = spec.model_dump(exclude_unset=True)
    tree["name"] = name or spec.name or f"psgd-{time.strftime('%Y%m%d-%H%M%S')}"
    tree["run"]["storage"] = storage or spec.run.storage
    return parse_spec(tree, "the job")


def _cluster(address: str | None) -> str | None:
    """Return the address to connect to; None: no other than the caller's connection, or a cluster of our own."""
    if not ray.is_initialized():
        return find_address(address)
    if address is not None:
        raise ClusterError(
            f"this process is connected to a Ray cluster already, so that it cannot use address {address!r}: leave the "
            "address out, or call ray.shutdown() before"
        )
    return None


def _open_directory(spec: JobSpec) -> RunDirectory:
    folder = Storage(spec.run.storage, spec.failure.timeout_s)
    run = RunDirectory(folder.folder(str(spec.name)))
    folder.probe()
    return run


def _check_run(run: RunDirectory, spec: JobSpec, resume: bool) -> None:
    """Refuse to begin a run anew, or to continue it as another job."""
    if not run.exists:
        return
    if not resume:
        raise RunExistsError(
            f"there is a run in {run.storage.url} already: --resume continues it, another --name starts a new one"
        )
    run.check_identity(spec)


def _continued(job: OpenJob, checkpoint: Checkpoint | None) -> JobSpec:
    """Return the job with the settings that it continues with; it must be the one that the checkpoint is of."""
    if checkpoint is None:
        return job.spec
    check_checkpoint(checkpoint.manifest, job, str(job.spec.name))
    return with_settings(job.spec, checkpoint.manifest)


def _own(run: RunDirectory, before: str | None) -> Owner:
    """Take the run over: its driver until now deletes nothing more, and commits at most what it is about to.

    Args:
        run: the run's directory.
        before: id of the driver that owned it when it was checked. Another one has checked the run like this one, and
            came first: Ray takes seconds to start.
    """
    if run.owned_by != before:
        raise RunExistsError(
            f"another driver took the run in {run.storage.url} while Ray was started here: --resume takes it over, "
            "another --name starts a new one"
        )
    return run.own()


def _caught_up(plan: RunPlan) -> RunPlan:
    """Continue from what the driver before this one committed while Ray was started here.

    It may have deleted the checkpoint that was checked.
    """
    checkpoint = find_checkpoint(plan.run, plan.job.spec, lambda fault: _refused(plan.run, fault))
    return replace(plan, checkpoint=checkpoint, spec=_continued(plan.job, checkpoint))


def _refused(run: RunDirectory, fault: str) -> None:
    warn(fault)
    run.event("checkpoint_refused", fault=fault)
