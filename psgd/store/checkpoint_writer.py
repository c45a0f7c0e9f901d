"""Saves: a run's checkpoints, as its driver commits them and a lost server's successor goes on from them."""

from __future__ import annotations

from psgd.core.context import RunContext
from psgd.core.driver.events import Commit, Committed, Saved, SaveFailed
from psgd.errors import StorageError
from psgd.store.checkpoints import Checkpoint, Checkpoints, Manifest, Part
from psgd.store.run_directory import RunDirectory

__all__ = ["CheckpointWriter"]


class CheckpointWriter:
    """One checkpoint at a time: begun, its parts taken, committed.

    Args:
        run: the run directory, owned.
        facts: of the run.
        data_fingerprint: of the data set.
        identity_hash: of the job as it was given.
        origin: the checkpoint that the run was resumed from; None: it begins.

    Attributes:
        committed: names of the checkpoints that this run's state descends from, as far as this process knows.
        origin: what servers are started from; None: the initial weights.
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
        self._name = ""  # of the one under way
        self._parts: dict[int, Part] = {}
        self.origin = origin
        self.committed = [origin.manifest.name] if origin else []

    def find_origin(self) -> None:
        """From now on servers are started from the newest checkpoint that is whole."""
        self.origin = self._checkpoints.newest(self._refused, self._misfit) or self.origin

    def _misfit(self, checkpoint: Checkpoint) -> str | None:
        """A newer one than the run was resumed from is of a branch that was given up."""
        return None if checkpoint.manifest.name in self.committed else "is none that this run goes on from"

    def _refused(self, fault: str) -> None:
        self._run.event("checkpoint_refused", fault=fault)

    def begin(self, number: int) -> str:
        """The name of a new one, whose parts the servers are to write."""
        self._parts = {}
        self._name = f"{number:06d}-{self._run.incarnation}"
        return self._name

    def take(self, number: int, part: Part) -> Saved:
        """A part of it is written."""
        self._parts[part.partition] = part
        return Saved(part.partition, number, part.updates, part.epochs)

    def commit(self, commit: Commit, requeued: int) -> Committed | SaveFailed:
        """All its parts are written.

        Raises:
            OwnershipError: another driver has taken the run.
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
        """What cannot be deleted now is deleted later: the checkpoint stands."""
        try:
            self._run.check_owner()  # whoever has taken the run since may go on from what would be deleted
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
            settings=next(iter(parts)).settings,  # the saved ones: newer ones may be on their way
            data_fingerprint=self._data_fingerprint,
            names=layout.names,
            shapes=layout.shapes,
            num_trainable=layout.num_trainable,
            partitions=len(self._context.partitions),
            requeued=requeued,
            files={name: checksum for part in parts for name, checksum in part.files.items()},
            journal={name: checksum for part in parts for name, checksum in part.journal.items()},
        )
