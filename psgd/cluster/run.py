"""One run, from the job to its result: check the job, start the run, supervise it, clean up."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from os import PathLike
from typing import Any

import ray

from psgd.cluster.preflight import RunPlan, preflight
from psgd.cluster.probe import ClusterProbe
from psgd.cluster.supervisor import Inputs, Supervisor
from psgd.core.context import RunContext
from psgd.core.driver.coordinator import Coordinator
from psgd.core.driver.events import Finish
from psgd.core.driver.status import RunStatus
from psgd.errors import CheckpointError, ClusterLostError, OwnershipError, RunFailedError, StorageError
from psgd.interruption import Interruption, run_interruptibly
from psgd.job import OpenJob
from psgd.monitoring.console import stderr_console, warn
from psgd.monitoring.metrics import run_metrics
from psgd.monitoring.observer import RunObserver
from psgd.monitoring.progress import Display
from psgd.monitoring.stages import Stages
from psgd.result import Result
from psgd.spec import JobSpec
from psgd.store.checkpoint_writer import CheckpointWriter
from psgd.store.checkpoints import Checkpoints
from psgd.store.run_directory import RunDirectory
from psgd_workers.counting import counted

__all__ = ["run_job", "train"]

_ENDINGS = {"failed": "failed", "unsaved": "is not saved"}


def train(
    spec: JobSpec | Mapping[str, Any],
    *,
    name: str | None = None,
    storage: str | PathLike[str] | None = None,
    address: str | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Result:
    """Train a model, and wait until the run has ended.

    Args:
        spec: the job, or a mapping with the fields of a job file.
        name: name of the run. Default: the job's name; without one, a name made from the present date and time.
        storage: folder or fsspec URL in which the run's directory is created. Default: `spec.run.storage`.
        address: address of a running Ray cluster, `HOST:PORT` or `auto`. Default: the present connection, or
            `RAY_ADDRESS`, or a local cluster of the job's size, which ends with the run.
        resume: True to continue the run of that name from its newest checkpoint, or to start it if it does not exist.
        progress: True to show progress on stderr.

    Returns:
        The result of the run. Its status is `finished`, or `stopped` after `psgd stop`.

    Raises:
        InputError: an argument cannot be used. Nothing was started.
        ClusterStartError: Ray did not start on this machine.
        ClusterLostError: the cluster refused a call before training began.
        RunFailedError: the run failed, or could not save its weights. The error's `result` says how far the run got.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP. A run that had begun was saved, unless the same signal came twice;
            `resume=True` continues it.

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
    stages = Stages(stderr_console(quiet=not progress))
    start = partial(
        run_job, spec, name=name, storage=storage, address=address, resume=resume, progress=progress, stages=stages
    )
    result = run_interruptibly(lambda: start(interruption=interruption), interruption)
    if result.status in ("failed", "unsaved"):
        raise RunFailedError(f"run {result.name} {_ENDINGS[result.status]}: {result.error}", result)
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
    stages: Stages,
) -> Result:
    """Train a model like `train`, but return a result for a failed or interrupted run, too.

    Args:
        spec: see `train`.
        name: see `train`.
        storage: see `train`.
        address: see `train`.
        resume: see `train`.
        progress: see `train`.
        interruption: receives the signals after which the run is saved and ended.
        stages: shows what is done before training begins.

    Raises:
        InputError: an argument cannot be used. Nothing was started.
        ClusterStartError: Ray did not start on this machine.
        ClusterLostError: the cluster refused a call before training began.
    """
    with preflight(
        spec,
        name=name,
        storage=storage,
        address=address,
        resume=resume,
        interruption=interruption,
        stages=stages,
    ) as plan:
        servers = counted(len(plan.partitions), "server")
        stages.show(f"starting {servers} and {counted(plan.spec.scaling.least_workers, 'worker')}")
        return _supervise(plan, progress, interruption)


def _supervise(plan: RunPlan, progress: bool, interruption: Interruption) -> Result:
    job = plan.job
    run = plan.run
    spec = plan.spec
    manifest = plan.checkpoint.manifest if plan.checkpoint else None
    run.begin(job.spec)
    run.event(
        "started",
        incarnation=plan.owner.incarnation,
        resumed=manifest.name if manifest else None,
        # A resumed run may have another scaling than `resolved.json`.
        workers=spec.scaling.model_dump()["workers"],
        pipeline=spec.scaling.pipeline,
        servers=len(plan.partitions),
        left_out=job.shards.left_out,
    )
    run.tolerate_faults(warn)  # from now on a log that cannot be written does not stop the run
    context = RunContext(
        spec,
        job.layout,
        job.shards.grid,
        plan.partitions,
        plan.owner.driver,
        run.storage.url,
    )
    inputs = Inputs(context, ray.put(job.dataset), ray.put(job.weights))
    checkpoint_writer = CheckpointWriter(
        run, context, job.dataset.fingerprint, job.spec.identity_hash(), plan.checkpoint
    )
    coordinator = Coordinator(
        spec,
        job.shards.grid,
        validates=job.dataset.validation is not None,
        checkpoint=Checkpoints(run.storage).next_number(),
        saved_updates=manifest.updates if manifest else None,
        saved_epochs=manifest.epochs if manifest else 0,
        requeued=manifest.requeued if manifest else 0,
    )
    checkpoint_writer.delete_unfinished()
    finish, status = _train(job, run, coordinator, inputs, checkpoint_writer, progress, interruption)
    finish = _unless_taken_over(run, finish)
    result = _result(run, status, finish, checkpoint_writer.committed[-1] if checkpoint_writer.committed else None)
    if run.is_ours:
        run.event("finished", status=finish.status, error=finish.error)
        run.finish(result)
    return result


def _unless_taken_over(run: RunDirectory, finish: Finish) -> Finish:
    """Return the way in which the training ended. If another driver took over the run, this is what ended it."""
    try:
        run.check_owner()
    except OwnershipError as error:
        return finish if str(error) in str(finish.error) else Finish("failed", str(error))
    except StorageError:  # it is not known; the result says what is saved
        pass
    return finish


def _train(
    job: OpenJob,
    run: RunDirectory,
    coordinator: Coordinator,
    inputs: Inputs,
    checkpoint_writer: CheckpointWriter,
    progress: bool,
    interruption: Interruption,
) -> tuple[Finish, RunStatus]:
    """Train. Return the way in which the training ended, and the last status of the run."""
    with Display(job.spec, stderr_console(quiet=not progress)) as display:
        observer = RunObserver(run, display, warn, time.monotonic())
        supervisor = Supervisor(
            coordinator,
            inputs,
            run,
            checkpoint_writer,
            observer,
            ClusterProbe.for_connection().check,
            lambda: interruption.requested,
        )
        try:
            with interruption.critical("the run is saved and ended"):
                finish = supervisor.train()
        except (StorageError, CheckpointError, OwnershipError, ClusterLostError) as error:
            # These are not input errors: the same storage and cluster worked when the run began.
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
