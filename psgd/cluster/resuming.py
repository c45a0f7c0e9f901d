"""Resuming: which checkpoint a run goes on from, and whether it may."""

from __future__ import annotations

from collections.abc import Callable

from psgd.core.server.repartition import disagreement
from psgd.errors import CheckpointError, ResumeError
from psgd.job import OpenJob
from psgd.spec import JobSpec
from psgd.spec.reader import parse_spec
from psgd.store.checkpoints import Checkpoint, Checkpoints, Manifest
from psgd.store.run_directory import RunDirectory

__all__ = ["check_checkpoint", "find_checkpoint", "with_settings"]


def find_checkpoint(run: RunDirectory, spec: JobSpec, refused: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that so many servers can go on from.

    One of another number of servers can be cut anew if all of them contain the same batches.

    Args:
        run: of this job.
        spec: the job.
        refused: told about every newer one, and why it is not used.

    Returns:
        None: nothing was ever committed.

    Raises:
        ResumeError: the checkpoints are of another job, none can be cut, or those that were committed are gone.
        CheckpointError: all are damaged.
    """
    servers = spec.scaling.servers
    misfits = list[Manifest]()

    def fits(checkpoint: Checkpoint) -> str | None:
        manifest = checkpoint.manifest
        if manifest.spec_hash != spec.identity_hash():
            raise ResumeError(
                f"checkpoint {manifest.name} in {run.storage.url} is of another job: its model, data, seed or settings "
                "are not those of the run it lies in. Restore the run's own, or start a new --name"
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
        return f"is of {manifest.partitions} servers and cannot be cut for {servers}, as {reason}"

    checkpoint = Checkpoints(run.storage).newest(refused, fits)
    if checkpoint is None and misfits:
        raise ResumeError(
            f"no checkpoint of {run.storage.url} can be cut for {servers} servers: their partitions do not contain the "
            f"same batches. Resume with scaling.servers={misfits[0].partitions}, end the run in good order (an epoch's "
            f"end, or `psgd stop`), and resume with {servers} then"
        )
    if checkpoint is None:
        _check_none_is_gone(run)
    return checkpoint


def _check_none_is_gone(run: RunDirectory) -> None:
    """Refuse to begin a run anew of which checkpoints were committed: its work would be lost without a word."""
    events = run.read_lines("events.jsonl") if run.exists else []
    committed = [event["name"] for event in events if event["event"] == "checkpoint"]
    if committed:
        raise ResumeError(
            f"{run.storage.url}/events.jsonl says that checkpoint {committed[-1]} was committed, and no checkpoint is "
            "left whole: restore the folder `checkpoints` from a copy. To begin anew, give another --name, or delete "
            f"{run.storage.url}"
        )


def check_checkpoint(manifest: Manifest, job: OpenJob, name: str) -> None:
    """Refuse what the job cannot go on from.

    Raises:
        ResumeError: the data or the model is another.
    """
    if manifest.data_fingerprint != job.dataset.fingerprint:
        raise ResumeError(
            f"the data of {name} is not what it was trained on (training part, validation part or class names): its "
            f"fingerprint is {job.dataset.fingerprint}, and the checkpoint's {manifest.data_fingerprint}. Restore the "
            "data, or start a new --name"
        )
    if manifest.layout != job.layout:
        raise ResumeError(
            f"the model of {name} has other tensors than checkpoint {manifest.name}: restore its code, or start a new "
            "--name"
        )


def with_settings(spec: JobSpec, manifest: Manifest) -> JobSpec:
    """The job with the settings that `psgd set` gave it while it ran before; they must go with its scaling."""
    if manifest.settings == spec.settings:
        return spec
    tree = spec.model_dump(mode="json") | manifest.settings.model_dump(mode="json")
    return parse_spec(tree, f"the job with the settings of checkpoint {manifest.name}")
