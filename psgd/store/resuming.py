"""Resuming: chooses the checkpoint that a run continues from, and checks that the job may continue from it."""

from __future__ import annotations

from collections.abc import Callable

from psgd.core.server.repartition import disagreement
from psgd.errors import CheckpointError, ResumeError
from psgd.job import OpenJob
from psgd.spec import JobSpec
from psgd.spec.reader import parse_spec
from psgd.store.checkpoints import Checkpoint, Checkpoints
from psgd.store.manifest import Manifest
from psgd.store.run_directory import RunDirectory
from psgd_workers.counting import counted

__all__ = ["check_checkpoint", "find_checkpoint", "with_settings"]


def find_checkpoint(run: RunDirectory, spec: JobSpec, refused: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest checkpoint from which the job can continue with its number of servers.

    A checkpoint of another number of servers can be repartitioned if all its partitions contain the same batches.

    Args:
        run: the run directory.
        spec: the job.
        refused: called for each newer checkpoint that is not used, with the reason.

    Returns:
        The checkpoint; None if the run never committed one.

    Raises:
        ResumeError: the checkpoints are of another job, or none can be repartitioned, or the committed ones are gone.
        CheckpointError: all checkpoints are damaged.
    """
    servers = spec.scaling.servers
    misfits = list[Manifest]()

    def why_unfit(checkpoint: Checkpoint) -> str | None:
        manifest = checkpoint.manifest
        if manifest.spec_hash != spec.identity_hash():
            raise ResumeError(
                f"checkpoint {manifest.name} in {run.storage.url} is of another job: its model, data, seed or settings "
                "differ from those of the run that it lies in. Restore the run's own checkpoint, or start a new run "
                "under another --name"
            )
        if manifest.partitions == servers:
            return None
        try:
            reason = disagreement(checkpoint.states())
        except CheckpointError as error:
            reason = str(error)
        if reason is None:
            return None
        misfits.append(manifest)
        origin = counted(manifest.partitions, "server")
        return f"is of {origin} and cannot be repartitioned for {servers}, because {reason}"

    checkpoint = Checkpoints(run.storage).newest(refused, why_unfit)
    if checkpoint is None and misfits:
        raise ResumeError(
            f"no checkpoint of {run.storage.url} can be repartitioned for {counted(servers, 'server')}: in each, the "
            f"partitions contain different batches. Resume with scaling.servers={misfits[0].partitions}, end the run "
            f"by `psgd stop` or at the end of an epoch, and then resume with {counted(servers, 'server')}"
        )
    if checkpoint is None:
        _check_never_committed(run)
    return checkpoint


def _check_never_committed(run: RunDirectory) -> None:
    """Refuse to begin the run anew if it has committed a checkpoint, because that work would be lost silently."""
    events = run.read_lines("events.jsonl") if run.exists else []
    committed = [event["name"] for event in events if event["event"] == "checkpoint"]
    if committed:
        raise ResumeError(
            f"{run.storage.url}/events.jsonl says that checkpoint {committed[-1]} was committed, but no checkpoint is "
            "left whole: restore the folder `checkpoints` from a copy. To start from the beginning, give another "
            f"--name, or delete {run.storage.url}"
        )


def check_checkpoint(manifest: Manifest, job: OpenJob, name: str) -> None:
    """Refuse a checkpoint whose data or model is not the job's.

    Args:
        manifest: manifest of the checkpoint.
        job: the job.
        name: name of the run, for the error message.

    Raises:
        ResumeError: the data or the model differs.
    """
    if manifest.data_fingerprint != job.dataset.fingerprint:
        raise ResumeError(
            f"the data of {name} is not what it was trained on (training part, validation part or class names): its "
            f"fingerprint is {job.dataset.fingerprint}, and that of checkpoint {manifest.name} is "
            f"{manifest.data_fingerprint}. Restore the data, or start a new run under another --name"
        )
    if manifest.layout != job.layout:
        raise ResumeError(
            f"the model of {name} has other tensors than checkpoint {manifest.name}: restore its code, or start a new "
            "run under another --name"
        )


def with_settings(spec: JobSpec, manifest: Manifest) -> JobSpec:
    """Return the job with the settings of a checkpoint, which `psgd set` may have changed.

    Raises:
        SpecError: the settings do not fit the job's scaling.
    """
    if manifest.settings == spec.settings:
        return spec
    tree = spec.model_dump(mode="json") | manifest.settings.model_dump(mode="json")
    return parse_spec(tree, f"the job with the settings of checkpoint {manifest.name}")
