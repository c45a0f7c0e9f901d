"""The writer of a run's checkpoints: the driver commits them, and restored servers start from them."""

from __future__ import annotations

from psgd.core.context import RunContext
from psgd.core.driver.events import Commit, Committed, Saved, SaveFailed
from psgd.errors import StorageError
from psgd.store.checkpoint_part import Part
from psgd.store.checkpoints import Checkpoint, Checkpoints
from psgd.store.manifest import Manifest
from psgd.store.run_directory import RunDirectory

__all__ = ["CheckpointWriter"]


class CheckpointWriter:
    """The driver's side of a checkpoint: begin it, collect the parts that servers wrote, commit it.

    There is one checkpoint in progress at a time.

    Args:
        run: the run directory, owned by this driver.
        context: context of the run.
        data_fingerprint: fingerprint of the data set.
        identity_hash: identity hash of the job as it was given.
        origin: the checkpoint that the run was resumed from; None for a run that begins.

    Attributes:
        committed: names of the checkpoints that the run's present state descends from, as far as this process knows.
        origin: the checkpoint that servers are started from; None for the initial weights.
    """

    def __init__(
        self,
        run: RunDirectory,
        context: RunContext,
        data_fingerprint: str,
        identity_hash: str,
        origin: Checkpoint | None,
    ) -> None:
        self._run = run
        self._context = context
        self._data_fingerprint = data_fingerprint
        self._identity_hash = identity_hash
        self._checkpoints = Checkpoints(run.storage)
        self._name = ""  # name of the checkpoint in progress
        self._parts: dict[int, Part] = {}
        self.origin = origin
        self.committed = [origin.manifest.name] if origin else []

    def refresh_origin(self) -> None:
        """Set `origin` to the newest whole checkpoint of this run."""
        self.origin = self._checkpoints.newest(self._record_refusal, self._why_unfit) or self.origin

    def _why_unfit(self, checkpoint: Checkpoint) -> str | None:
        """Return the reason why a checkpoint cannot be the origin; None if it can.

        A checkpoint that this driver neither resumed from nor committed may belong to a history that was given up.
        """
        return None if checkpoint.manifest.name in self.committed else "is not part of this run's history"

    def _record_refusal(self, fault: str) -> None:
        self._run.event("checkpoint_refused", fault=fault)

    def begin(self, number: int) -> str:
        """Begin a checkpoint. Return its name, under which the servers write their parts."""
        self._parts = {}
        has_failed = self._name not in ("", *self.committed)
        self._name = f"{number:06d}-{self._run.incarnation}"
        if has_failed:
            self.delete_unfinished(self._name)
        return self._name

    def delete_unfinished(self, before: str = "") -> None:
        """Delete checkpoints that were begun and not committed. A fault of the storage is recorded.

        Args:
            before: name of a checkpoint, which is kept, as are later ones. Default: the newest of all.

        Raises:
            OwnershipError: another driver has taken over the run, and may be writing one of them.
        """
        try:
            self._run.check_owner()
            if name := before or next(reversed(self._checkpoints.names()), ""):
                self._checkpoints.delete_unfinished(name)
        except StorageError as error:
            self._run.event("not_deleted", fault=str(error))

    def add_part(self, number: int, part: Part) -> Saved:
        """Add a part that a server has written to checkpoint `number`."""
        self._parts[part.partition] = part
        return Saved(part.partition, number, part.updates, part.epochs)

    def commit(self, commit: Commit, requeued: int) -> Committed | SaveFailed:
        """Commit the checkpoint, all parts of which are written, and delete old checkpoints.

        Args:
            commit: the action to perform.
            requeued: number of batches that were leased again so far.

        Returns:
            The event for the coordinator.

        Raises:
            OwnershipError: another driver has taken over the run.
        """
        manifest = self._manifest(commit, requeued)
        try:
            self._run.check_owner()
            self._checkpoints.commit(manifest)
        except StorageError as error:
            return SaveFailed(commit.checkpoint, str(error))
        self.committed.append(manifest.name)
        deleted = self._prune()
        self._run.event("checkpoint", name=manifest.name, updates=commit.updates, epochs=commit.epochs, deleted=deleted)
        return Committed(commit.checkpoint)

    def _prune(self) -> list[str]:
        """Delete old checkpoints, and return their names. After a fault of the storage, the next call tries again."""
        try:
            self._run.check_owner()  # a new owner may be about to continue from a checkpoint that would be deleted
            return self._checkpoints.prune(self._context.spec.checkpoint.keep)
        except StorageError as error:
            self._run.event("not_deleted", fault=str(error))
            return []

    def _manifest(self, commit: Commit, requeued: int) -> Manifest:
        layout = self._context.layout
        spec = self._context.spec
        parts = self._parts.values()
        return Manifest(
            format=1,
            name=self._name,
            incarnation=self._run.incarnation,
            updates=commit.updates,
            epochs=commit.epochs,
            seed=spec.seed,
            spec_hash=self._identity_hash,
            settings=next(iter(parts)).settings,  # as saved: `psgd set` may have changed the run's settings since
            data_fingerprint=self._data_fingerprint,
            names=layout.names,
            shapes=layout.shapes,
            num_trainable=layout.num_trainable,
            partitions=len(self._context.partitions),
            requeued=requeued,
            files={name: checksum for part in parts for name, checksum in part.files.items()},
            journal={name: checksum for part in parts for name, checksum in part.journal.items()},
        )
