"""One run, from the job to its result: check everything, start, supervise, tidy up."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import Any

import ray

from psgd.cluster.resuming import check_checkpoint, find_checkpoint, with_settings
from psgd.cluster.session import check_address, check_room, session
from psgd.cluster.supervisor import Inputs, Supervisor
from psgd.core.context import RunContext
from psgd.core.driver.coordinator import Coordinator
from psgd.core.driver.events import Finish
from psgd.core.driver.status import RunStatus
from psgd.core.server.partitions import Partition, partition_weights
from psgd.errors import CheckpointError, OwnershipError, RunExistsError, RunFailedError, StorageError
from psgd.interruption import Interruption, run_interruptibly
from psgd.job import OpenJob
from psgd.monitoring.console import stderr_console, warn
from psgd.monitoring.metrics import run_metrics
from psgd.monitoring.observer import Observer
from psgd.monitoring.progress import Display
from psgd.result import Result
from psgd.spec import JobSpec
from psgd.spec.reader import as_spec, parse_spec
from psgd.store.checkpoint_writer import CheckpointWriter
from psgd.store.checkpoints import Checkpoint, Checkpoints
from psgd.store.owner import Owner
from psgd.store.run_directory import RunDirectory
from psgd.store.storage import Storage, location

__all__ = ["run_job", "train"]

_ENDED = {"failed": "failed", "unsaved": "is not saved"}


def train(
    spec: JobSpec | Mapping[str, Any],
    *,
    name: str | None = None,
    storage: str | PathLike[str] | None = None,
    address: str | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Result:
    """Train a model, and wait for it.

    Args:
        spec: the job, or a mapping with the fields of a job file.
        name: of the run; default: the job's, else one made of the time.
        storage: folder or fsspec URL for the run's directory; default: `spec.run.storage`.
        address: of a running Ray cluster, `HOST:PORT` or `auto`; default: the present connection, `RAY_ADDRESS`, or
            a local cluster of the job's size, which ends with the run.
        resume: continue the run of that name from its newest checkpoint; if there is none, start it.
        progress: whether to show progress on stderr.

    Returns:
        How the run ended: `finished`, or `stopped` by `psgd stop`.

    Raises:
        InputError: something given cannot be used; nothing was started.
        RunFailedError: the run failed, or could not save what it came to; its `result` says how far it came.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP. A run that had begun was saved, unless the same signal came twice,
            and `resume=True` goes on from there.

    Example:
        >>> result = psgd.train(psgd.JobSpec(
        ...     model={"kind": "mlp", "hidden": [64]},
        ...     data={"format": "sklearn", "dataset": "digits", "validation_fraction": 0.2},
        ...     optimizer={"lr": 0.1},
        ...     run={"epochs": 10},
        ... ))
        >>> result.metrics["val/accuracy"]
    """
    interruption = Interruption()
    start = partial(run_job, spec, name=name, storage=storage, address=address, resume=resume, progress=progress)
    result = run_interruptibly(lambda: start(interruption=interruption), interruption)
    if result.status in ("failed", "unsaved"):
        raise RunFailedError(f"run {result.name} {_ENDED[result.status]}: {result.error}", result)
    if result.status == "interrupted":
        raise KeyboardInterrupt(f"run {result.name} was interrupted; resume=True continues it")
    return result


def run_job(
    spec: JobSpec | Mapping[str, Any],
    *,
    name: str | None,
    storage: str | PathLike[str] | None,
    address: str | None,
    resume: bool,
    progress: bool,
    interruption: Interruption,
) -> Result:
    """As `train`, but a failed or interrupted run is a result like any other."""
    interruption.outlook = "nothing was started"
    spec = as_spec(spec)
    name = name or spec.name or f"psgd-{time.strftime('%Y%m%d-%H%M%S')}"
    spec = _named(spec, name, None if storage is None else location(storage))
    check_address(address)
    run = RunDirectory(Storage(spec.run.storage, spec.failure.timeout_s).folder(name))
    Storage(spec.run.storage, spec.failure.timeout_s).probe()
    _check_run(run, spec, resume)
    checkpoints = Checkpoints(run.storage)
    refused = partial(_warn, run)
    committed = checkpoints.committed()
    checkpoint = find_checkpoint(run, spec, refused)
    job = OpenJob.open(spec)
    partitions = partition_weights(job.layout.num_parameters, job.layout.num_trainable, spec.scaling.servers)
    for warning in replace(job, spec=_going_on(job, checkpoint)).warnings():
        warn(warning)
    with interruption.critical("Ray is stopped as soon as it has started"), session(spec, address):
        interruption.check()
        check_room(spec, job.layout.num_parameters)
        interruption.check()
        _check_run(run, spec, resume)  # again: Ray takes seconds, in which another driver may have begun it
        owner = run.own()  # whoever had it deletes nothing any more, and commits at most what it is about to
        if checkpoints.committed() != committed:
            checkpoint = find_checkpoint(run, spec, refused)
        return _supervise(job, _going_on(job, checkpoint), partitions, run, owner, checkpoint, progress, interruption)


def _named(spec: JobSpec, name: str, storage: str | None) -> JobSpec:
    tree = spec.model_dump(exclude_unset=True)
    tree["name"] = name
    tree["run"]["storage"] = storage or spec.run.storage
    return parse_spec(tree, "the job")


def _check_run(run: RunDirectory, spec: JobSpec, resume: bool) -> None:
    """Nothing that is there may be begun anew, or gone on with as another job."""
    if not run.exists:
        return
    if not resume:
        raise RunExistsError(
            f"there is a run in {run.storage.url} already: --resume continues it, another --name starts a new one"
        )
    run.check_identity(spec)


def _going_on(job: OpenJob, checkpoint: Checkpoint | None) -> JobSpec:
    """The job with the settings that it goes on by; it must be the one that the checkpoint is of."""
    if checkpoint is None:
        return job.spec
    check_checkpoint(checkpoint.manifest, job, str(job.spec.name))
    return with_settings(job.spec, checkpoint.manifest)


def _warn(run: RunDirectory, fault: str) -> None:
    warn(fault)
    run.event("checkpoint_refused", fault=fault)


def _supervise(
    job: OpenJob,
    spec: JobSpec,
    partitions: tuple[Partition, ...],
    run: RunDirectory,
    owner: Owner,
    checkpoint: Checkpoint | None,
    progress: bool,
    interruption: Interruption,
) -> Result:
    """`spec` is the job's own, with the settings that it goes on by."""
    manifest = checkpoint.manifest if checkpoint else None
    run.begin(job.spec)
    run.event(
        "started",
        incarnation=owner.incarnation,
        resumed=manifest.name if manifest else None,
        workers=spec.scaling.model_dump()["workers"],  # which may differ from the first description's,
        pipeline=spec.scaling.pipeline,  # as may these
        servers=len(partitions),
        left_out=job.shards.left_out,
    )
    run.bear_faults(warn)  # from here on it is not stopped by its own log
    context = RunContext(
        spec,
        job.layout,
        job.shards.grid,
        partitions,
        owner.driver,
        run.storage.url,
    )
    inputs = Inputs(
        context,
        ray.put(job.dataset),
        ray.put(job.weights),
        lambda batch: len(job.shards.examples(batch)),
    )
    checkpoint_writer = CheckpointWriter(run, context, job.dataset.fingerprint, job.spec.identity_hash(), checkpoint)
    coordinator = Coordinator(
        spec,
        job.shards.grid,
        validates=job.dataset.validation is not None,
        checkpoint=Checkpoints(run.storage).next_number(),
        saved_updates=manifest.updates if manifest else None,
        saved_epochs=manifest.epochs if manifest else 0,
        requeued=manifest.requeued if manifest else 0,
    )
    finish, status = _train(job, run, coordinator, inputs, checkpoint_writer, progress, interruption)
    result = _result(run, status, finish, checkpoint_writer.committed[-1] if checkpoint_writer.committed else None)
    if run.is_ours:
        run.event("finished", status=finish.status, error=finish.error)
        run.finish(result)
    return result


def _train(
    job: OpenJob,
    run: RunDirectory,
    coordinator: Coordinator,
    inputs: Inputs,
    checkpoint_writer: CheckpointWriter,
    progress: bool,
    interruption: Interruption,
) -> tuple[Finish, RunStatus]:
    """Train. Return how it ended, and the run's last status."""
    with Display(job.spec, stderr_console(quiet=not progress)) as display:
        observer = Observer(run, display, warn, time.monotonic())
        supervisor = Supervisor(coordinator, inputs, run, checkpoint_writer, observer, lambda: interruption.requested)
        try:
            with interruption.critical("the run is saved and ended"):
                finish = supervisor.train()
        except (StorageError, CheckpointError, OwnershipError) as error:  # no input any more: it worked at the start
            finish = Finish("failed", f"{error}; {coordinator.status(time.monotonic()).checkpoint.text}")
        status = coordinator.status(time.monotonic())
        observer.finish(status)
    return finish, status


def _result(run: RunDirectory, status: RunStatus, finish: Finish, checkpoint: str | None) -> Result:
    return Result(
        status=finish.status,
        name=run.storage.url.rpartition("/")[2],
        path=run.storage.url,
        epochs=status.epochs,
        updates=status.updates,
        samples=status.examples,
        duration_s=status.elapsed_s,
        metrics=run_metrics(status),
        ledger=status.ledger,
        failures=dict(status.failures),
        goodput=status.goodput,
        checkpoint=checkpoint,
        error=finish.error,
    )
