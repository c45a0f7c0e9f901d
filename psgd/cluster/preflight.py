"""Preflight: the checks of a run, before any training process exists.

Each is made once. Only the checkpoint is chosen again if the run's former driver committed another one meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import ray

from psgd.cluster.address import find_address
from psgd.cluster.session import check_room, session
from psgd.core.server.partitions import Partition, partition_weights
from psgd.errors import ClusterError, RunExistsError
from psgd.interruption import Interruption
from psgd.job import OpenJob
from psgd.monitoring.console import warn
from psgd.monitoring.stages import Stages
from psgd.spec import JobSpec
from psgd.spec.reader import as_spec, parse_spec
from psgd.store.checkpoints import Checkpoint, Checkpoints
from psgd.store.owner import Owner
from psgd.store.resuming import check_checkpoint, find_checkpoint, with_settings
from psgd.store.run_directory import RunDirectory
from psgd.store.storage import Storage, location

__all__ = ["RunPlan", "preflight"]


@dataclass(frozen=True, slots=True)
class RunPlan:
    """A run that passed every check, with everything that it starts from.

    Attributes:
        job: the job as given, with a name. Its data is open, and its model was tried on two batches.
        partitions: the slices of the weights, one for each server.
        run: the run directory, whose storage was tested.
        spec: the job, with the settings of the checkpoint if there is one.
        checkpoint: the newest checkpoint that the run can continue from; None for a run that begins.
        owner: this driver, as the new owner of the run.
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
    stages: Stages,
) -> Iterator[RunPlan]:
    """Check the job, the storage, the data, the model and the checkpoint, then connect to Ray and take over the run.

    Args:
        spec: the job.
        name: name of the run. None: the job's name, or else a name made from the present date and time.
        storage: folder or URL that holds the runs. None: the job's storage.
        address: address of a running cluster; see `find_address`.
        resume: True to continue a run that exists.
        interruption: signals that may end the checks.
        stages: shows which check is done.

    Yields:
        The plan. While the block lasts, Ray is connected and has room for the job.

    Raises:
        InputError: the job cannot be run. No training process was started, and no other driver was disturbed.
        ClusterStartError: no local Ray could be started.
        ClusterLostError: the cluster refused a call.
    """
    interruption.outlook = "nothing was started"
    spec = _with_name(as_spec(spec), name, None if storage is None else location(storage))
    address = _find_cluster(address)
    run = _open_directory(spec)
    former_driver = run.owned_by
    _check_run(run, spec, resume)
    committed = Checkpoints(run.storage).committed()
    faults: list[str] = []  # recorded once this driver owns the run

    def refuse(fault: str) -> None:
        warn(fault)
        faults.append(fault)

    checkpoint = find_checkpoint(run, spec, refuse)
    stages.show("opening the data, and trying the model on two batches")
    job = OpenJob.open(spec)
    partitions = partition_weights(job.layout.num_parameters, job.layout.num_trainable, spec.scaling.servers)
    continued = _with_settings_of(job, checkpoint)
    for warning in replace(job, spec=continued).warnings():
        warn(warning)
    stages.show(f"connecting to Ray at {address}" if address else "starting Ray on this machine")
    with interruption.critical("Ray is stopped as soon as it has started"), session(spec, address):
        interruption.check()
        check_room(spec, job.layout.num_parameters)
        interruption.check()
        plan = RunPlan(job, partitions, run, continued, checkpoint, run.take_over(former_driver))
        if Checkpoints(run.storage).committed() != committed:
            plan = _with_newest_checkpoint(plan, refuse)
        for fault in faults:
            run.event("checkpoint_refused", fault=fault)
        yield plan


def _with_name(spec: JobSpec, name: str | None, storage: str | None) -> JobSpec:
    tree = spec.model_dump(exclude_unset=True)
    tree["name"] = name or spec.name or f"psgd-{time.strftime('%Y%m%d-%H%M%S')}"
    tree["run"]["storage"] = storage or spec.run.storage
    return parse_spec(tree, "the job")


def _find_cluster(address: str | None) -> str | None:
    """Return the address to connect to. None: use the connection that the caller has, or start a local cluster."""
    if not ray.is_initialized():
        return find_address(address)
    if address is not None:
        raise ClusterError(
            f"this process is connected to a Ray cluster already, so it cannot use address {address!r}. Leave the "
            "address out, or call ray.shutdown() first"
        )
    return None


def _open_directory(spec: JobSpec) -> RunDirectory:
    folder = Storage(spec.run.storage, spec.failure.timeout_s)
    run = RunDirectory(folder.folder(str(spec.name)))
    folder.probe()
    return run


def _check_run(run: RunDirectory, spec: JobSpec, resume: bool) -> None:
    """Refuse to start a run that exists already, or to resume it as another job."""
    if not run.exists:
        return
    if not resume:
        raise RunExistsError(
            f"there is a run in {run.storage.url} already: --resume continues it, another --name starts a new one"
        )
    run.check_identity(spec)


def _with_settings_of(job: OpenJob, checkpoint: Checkpoint | None) -> JobSpec:
    """Return the job with the settings of the checkpoint, after checking that the checkpoint is of this job."""
    if checkpoint is None:
        return job.spec
    check_checkpoint(checkpoint.manifest, job, str(job.spec.name))
    return with_settings(job.spec, checkpoint.manifest)


def _with_newest_checkpoint(plan: RunPlan, refuse: Callable[[str], None]) -> RunPlan:
    """Return the plan with the newest checkpoint.

    The run's former driver committed a checkpoint while Ray was started here, and may have deleted the one in the plan.
    """
    checkpoint = find_checkpoint(plan.run, plan.job.spec, refuse)
    return replace(plan, checkpoint=checkpoint, spec=_with_settings_of(plan.job, checkpoint))
