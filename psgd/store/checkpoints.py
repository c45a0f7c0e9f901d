"""Checkpoints. Each is a directory of its own, which is never renamed.

A checkpoint is whole if and only if its file COMMITTED exists and the checksums in it hold.

    checkpoints/000007-2/        checkpoint 7, written while the newest server was incarnation 2
      server-0.safetensors       and server-0.json: the part of partition 0, see `psgd.store.checkpoint_part`
      COMMITTED                  the manifest, which the driver writes last, see `psgd.store.manifest`

Servers write their parts themselves, and send only names and checksums to the driver.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from os import PathLike

import numpy as np

from psgd.core.server.partitions import Partition
from psgd.core.server.repartition import disagreement, repartition
from psgd.core.server.state import ServerState
from psgd.errors import CheckpointError, DamagedFileError, StorageError
from psgd.jsontext import MOST_BYTES
from psgd.store.checkpoint_part import read_part
from psgd.store.manifest import Manifest, is_complete
from psgd.store.storage import Storage
from psgd_workers.counting import counted
from psgd_workers.messages import FloatArray

__all__ = ["Checkpoint", "Checkpoints", "load_weights"]

NAME = re.compile(r"\d+-\d+")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A committed checkpoint whose checksums hold."""

    run: Storage
    manifest: Manifest

    def state(self, partition: int) -> ServerState:
        """Return the state that the server of a partition saved.

        Raises:
            CheckpointError: the part does not hold what a server writes.
        """
        return read_part(self.run, self.manifest.name, partition)

    def states(self) -> list[ServerState]:
        """Return the states of all partitions, by number."""
        return [self.state(number) for number in range(self.manifest.partitions)]

    def state_for(self, partition: Partition, servers: int) -> ServerState:
        """Return the state of one partition, repartitioned if the checkpoint has another number of partitions.

        Args:
            partition: the partition, as one of `servers`.
            servers: number of servers of the run that continues.

        Raises:
            CheckpointError: a part does not hold what a server writes, or the parts do not agree.
        """
        if servers == self.manifest.partitions:
            return self.state(partition.number)
        states = self.states()
        if reason := disagreement(states):
            raise CheckpointError(
                f"checkpoint {self.manifest.name} cannot be repartitioned for {counted(servers, 'server')}: {reason}"
            )
        return repartition(states, partition)

    def weights(self, averaged: bool = False) -> FloatArray:
        """Return the weights of all partitions, float32 `[num_parameters]`.

        Args:
            averaged: return the moving average of the trainable weights instead.

        Raises:
            CheckpointError: a part is damaged, or the job keeps no average.
        """
        states = sorted(self.states(), key=lambda state: state.partition.start)
        if averaged:
            for state in states:
                if "average" not in state.arrays:
                    raise CheckpointError(
                        f"checkpoint {self.manifest.name} has no average: its job sets no optimizer.ema"
                    )
                state.arrays["weights"][: len(state.arrays["average"])] = state.arrays["average"]
        weights = np.concatenate([state.arrays["weights"] for state in states])
        if weights.shape != (self.manifest.layout.num_parameters,):
            raise CheckpointError(
                f"checkpoint {self.manifest.name} has {weights.size} weights, but its tensors have "
                f"{self.manifest.layout.num_parameters} values. Restore the directory from a copy, or delete it"
            )
        return weights


class Checkpoints:
    """The checkpoints of one run.

    Args:
        run: the folder of the run.
    """

    def __init__(self, run: Storage) -> None:
        self._run = run

    def names(self) -> list[str]:
        """Return the names of all checkpoints, committed or not, oldest first."""
        return sorted((name for name in self._run.names("checkpoints") if NAME.fullmatch(name)), key=_order)

    def committed(self) -> list[str]:
        """Return the names of the committed checkpoints, oldest first. A truncated COMMITTED does not count."""
        return [name for name in self.names() if self._is_committed(name)]

    def _is_committed(self, name: str) -> bool:
        try:
            return is_complete(self._committed_text(name))
        except DamagedFileError:  # too large: damaged, not truncated
            return True

    def _committed_text(self, name: str) -> bytes | None:
        """Return the content of COMMITTED; None if there is no such file."""
        path = f"checkpoints/{name}/COMMITTED"
        return self._run.read(path, MOST_BYTES) if self._run.exists(path) else None

    def next_number(self) -> int:
        """Return the number after the highest of all checkpoints, whole or not."""
        return max((int(name.partition("-")[0]) for name in self.names()), default=0) + 1

    def commit(self, manifest: Manifest) -> None:
        """Commit a checkpoint, all parts of which are written."""
        self._run.write(f"checkpoints/{manifest.name}/COMMITTED", manifest.to_bytes())

    def newest(
        self, refused: Callable[[str], None], why_unfit: Callable[[Checkpoint], str | None] | None = None
    ) -> Checkpoint | None:
        """Return the newest checkpoint that is whole and can be used.

        Args:
            refused: called with a sentence for each newer checkpoint that is damaged or cannot be used.
            why_unfit: returns the reason why a whole checkpoint cannot be used, or None if it can. Default: all can.

        Returns:
            The checkpoint; None if no whole checkpoint can be used.

        Raises:
            CheckpointError: there are directories with a COMMITTED, but all are damaged.
        """
        faults = []
        whole = False
        for name in reversed(self.names()):
            try:
                if self._committed_text(name) is None:
                    continue
                checkpoint = self.open(name)
            except (CheckpointError, StorageError) as error:
                faults.append(str(error))
                refused(f"{error}; psgd tries the previous checkpoint")
                continue
            whole = True
            if (reason := why_unfit(checkpoint) if why_unfit else None) is None:
                return checkpoint
            refused(f"checkpoint {name} {reason}; psgd tries the previous checkpoint")
        if faults and not whole:
            raise CheckpointError(f"every checkpoint in {self._run.url} is damaged: {'; '.join(faults)}")
        return None

    def open(self, name: str) -> Checkpoint:
        """Return a checkpoint after checking every file.

        Raises:
            CheckpointError: the checkpoint is not committed, has another format, or a checksum fails.
            StorageError: a file cannot be read.
        """
        folder = self._run.folder(f"checkpoints/{name}")
        manifest = self.manifest(name)
        for file, checksum in manifest.files.items():
            if not folder.exists(file) or sha256(folder.read(file)).hexdigest() != checksum:
                raise CheckpointError(f"checkpoint {name}: {file} is missing, or its checksum is not the committed one")
        return Checkpoint(self._run, manifest)

    def manifest(self, name: str) -> Manifest:
        """Return the manifest of a checkpoint. The files themselves are not checked.

        Raises:
            CheckpointError: the checkpoint is not committed, has another format, or its COMMITTED is damaged.
        """
        text = self._committed_text(name)
        if text is None:
            raise CheckpointError(f"checkpoint {name} in {self._run.url} was never committed")
        if not is_complete(text):
            raise CheckpointError(
                f"checkpoint {name} in {self._run.url} was not committed: its COMMITTED is cut short. Restore the file "
                "from a copy, or delete the directory"
            )
        try:
            return Manifest.of(text, name, f"{self._run.url}/checkpoints/{name}/COMMITTED")
        except DamagedFileError as error:
            raise CheckpointError(f"checkpoint {name}: {error}") from error

    def delete_unfinished(self, before: str) -> None:
        """Delete the directories without COMMITTED, or with a truncated one, that are older than a checkpoint.

        Args:
            before: name of a checkpoint, committed or not. Directories of a later incarnation are left alone: the
                driver of that incarnation may be writing them.
        """
        number, newest = _order(before)
        for name in self.names():
            _, incarnation = _order(name)
            if _order(name) < (number, newest) and incarnation <= newest and not self._is_committed(name):
                self._run.delete(f"checkpoints/{name}")

    def prune(self, keep: int) -> list[str]:
        """Delete old checkpoints, and older directories that a crash left unfinished.

        The newest `keep` are kept, and all that are newer than these. A checkpoint with a damaged COMMITTED does not
        count.

        Returns:
            The names of the committed checkpoints that were deleted.
        """
        names = self.names()
        whole = [name for name in names if self._has_manifest(name)]
        kept = whole[-keep:]
        deleted = []
        for name in names:
            is_committed = self._is_committed(name)
            if is_committed and len(kept) == keep and _order(name) < _order(kept[0]):
                # COMMITTED first, so that a half-deleted directory does not count as whole.
                self._run.delete(f"checkpoints/{name}/COMMITTED")
                deleted.append(name)
            elif is_committed or not kept or _order(name) > _order(kept[-1]):
                continue
            self._run.delete(f"checkpoints/{name}")
        return deleted

    def _has_manifest(self, name: str) -> bool:
        """Return True if a directory has a COMMITTED that is not damaged."""
        try:
            self.manifest(name)
        except (CheckpointError, DamagedFileError):
            return False
        return True


def _order(name: str) -> tuple[int, ...]:
    return tuple(map(int, name.split("-")))


def load_weights(path: str | PathLike[str], averaged: bool = False) -> dict[str, FloatArray]:
    """Return the weights that a run saved last, by tensor name.

    Args:
        path: directory of a run, or of one checkpoint inside it, as a string, a `Path` or an fsspec URL.
        averaged: True to return the moving average of the weights (see `optimizer.ema`), False to return the weights.

    Returns:
        A float32 array for each tensor name, including buffers.

    Raises:
        StorageError: `path` is neither a path nor a URL that can be opened.
        CheckpointError: there is no whole checkpoint, or it contains no average.

    Example:
        >>> weights = psgd.load_weights("runs/digits")
        >>> weights["layers.0.weight"].shape
        (64, 64)
    """
    folder = Storage(path)
    if folder.exists("COMMITTED"):
        run, _, name = folder.url.rstrip("/").rpartition("/checkpoints/")
        if not run:
            raise CheckpointError(
                f"{folder.url} is a checkpoint outside of a run. Give the run, or copy the checkpoint into a directory "
                "checkpoints, under the name that it had in its run"
            )
        checkpoint: Checkpoint | None = Checkpoints(Storage(run)).open(name)
    else:
        checkpoint = Checkpoints(folder).newest(refused=lambda _: None)
    if checkpoint is None:
        raise CheckpointError(f"there is no committed checkpoint in {folder.url}")
    return checkpoint.manifest.layout.views(checkpoint.weights(averaged))
