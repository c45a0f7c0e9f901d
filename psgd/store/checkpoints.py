"""Checkpoints. Each is a directory of its own, which is never renamed.

A checkpoint is whole if and only if its file COMMITTED exists and the checksums in it hold.

    checkpoints/000007-2/        checkpoint 7, written while the newest server was incarnation 2
      server-0.safetensors       weights, optimizer state and applied sets of partition 0
      server-0.json              versions and counts of partition 0
      COMMITTED                  the Manifest, which the driver writes last

Servers write their parts themselves, and send only names and checksums to the driver.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from itertools import islice
from os import PathLike
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from psgd.core.server.partitions import Partition
from psgd.core.server.repartition import disagreement, repartition
from psgd.core.server.state import ServerState
from psgd.errors import CheckpointError, DamagedFileError, StorageError
from psgd.jsontext import MOST_BYTES, RECOVERY, parse_json, to_json
from psgd.spec import Settings
from psgd.store.records import describe, parse_document
from psgd.store.storage import Storage
from psgd_workers.counting import counted
from psgd_workers.gradients.layout import Layout
from psgd_workers.messages import FloatArray
from psgd_workers.spec import Spec

__all__ = ["Checkpoint", "Checkpoints", "Manifest", "Part", "load_weights", "write_part"]

FORMAT = 1
NAME = re.compile(r"\d+-\d+")


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a checkpoint that one server wrote."""

    partition: int
    updates: int
    epochs: int  # complete epochs
    settings: Settings  # settings of the server when it wrote the part
    files: Mapping[str, str]  # name in the checkpoint's directory -> SHA-256
    journal: Mapping[str, str]  # name in the journal's directory -> SHA-256


class Manifest(Spec):
    """The content of COMMITTED."""

    format: Literal[1]
    """Format of this file and of the parts."""
    name: str
    """Name of the checkpoint's directory."""
    incarnation: int
    """Incarnation of the newest server when the checkpoint was written."""
    updates: int
    """Number of steps in the partition that has the fewest."""
    epochs: int
    """Number of epochs that are complete in every partition."""
    seed: int
    """Seed of the job."""
    spec_hash: str
    """`JobSpec.identity_hash()`."""
    settings: Settings
    """Settings of the servers, including the changes by `psgd set`."""
    data_fingerprint: str
    """`Dataset.fingerprint`."""
    names: tuple[str, ...]
    """`Layout.names`."""
    shapes: tuple[tuple[int, ...], ...]
    """`Layout.shapes`."""
    num_trainable: int
    """`Layout.num_trainable`."""
    partitions: int
    """Number of partitions, which is the number of parts."""
    requeued: int
    """Number of batches that were leased again so far."""
    files: dict[str, str]
    """SHA-256 of every file in the directory, by name, except COMMITTED."""
    journal: dict[str, str]
    """SHA-256 of every journal segment that was written with the checkpoint, by name."""

    @property
    def layout(self) -> Layout:
        return Layout(self.names, self.shapes, self.num_trainable)

    def to_bytes(self) -> bytes:
        """Return the content of COMMITTED: these fields, and a checksum of them."""
        fields = self.model_dump(mode="json")
        return (to_json(fields | {"checksum": _checksum(fields)}, indent=2) + "\n").encode()

    @classmethod
    def of(cls, text: bytes, name: str, source: str) -> Manifest:
        """Return the manifest in a COMMITTED.

        Args:
            text: content of the file.
            name: name of the directory that the file lies in.
            source: path or URL of the file, for errors.

        Raises:
            CheckpointError: the manifest has another format, belongs to another directory, or lacks files.
            DamagedFileError: the file is not as psgd wrote it.
        """
        fields = parse_json(text, source)
        if not isinstance(fields, dict):
            raise _damaged(source, "it is not an object")
        if fields.get("format") != FORMAT:
            raise CheckpointError(
                f"checkpoint {name} has format {fields.get('format')!r:.80}, and this psgd reads format {FORMAT}: "
                "use the psgd that wrote it"
            )
        if fields.pop("checksum", None) != _checksum(fields):
            raise _damaged(source, "its content does not have the checksum that it names")
        try:
            manifest = cls.model_validate_json(to_json(fields))
        except ValidationError as error:
            raise _damaged(source, describe(error)) from error
        if manifest.name != name:
            raise CheckpointError(
                f"checkpoint {name}: its COMMITTED is that of checkpoint {manifest.name:.80}. Restore the directory "
                "from a copy, or delete it"
            )
        if missing := manifest.missing_files():
            raise CheckpointError(
                f"checkpoint {name}: its COMMITTED lacks {', '.join(missing)}. Restore the directory from a copy, or "
                "delete it"
            )
        return manifest

    def missing_files(self) -> list[str]:
        """Return names of the first files that the manifest should name, but does not."""
        names = (name for partition in range(self.partitions) for name in _part_files(partition))
        return list(islice((name for name in names if name not in self.files), 4))


def _part_files(partition: int) -> tuple[str, str]:
    return f"server-{partition}.safetensors", f"server-{partition}.json"


def _checksum(fields: dict[str, Any]) -> str:
    return sha256(to_json(fields, sort_keys=True).encode()).hexdigest()


def _damaged(source: str, reason: str) -> DamagedFileError:
    return DamagedFileError(f"{source} is damaged ({reason}): {RECOVERY}")


def write_part(run: Storage, checkpoint: str, state: ServerState, journal: NDArray[np.void]) -> Part:
    """Write one server's part of a checkpoint, and its journal since the last checkpoint.

    Args:
        run: the folder of the run.
        checkpoint: name of the checkpoint.
        state: state of the server.
        journal: records of the dtype that `psgd.core.server.journal.record_type` returns.

    Returns:
        The names and checksums of the files.

    Raises:
        StorageError: a file could not be written.
    """
    partition = state.metadata["partition"][0]
    arrays = save({name: np.ascontiguousarray(array) for name, array in state.arrays.items()})
    files = dict(zip(_part_files(partition), (arrays, to_json(state.metadata).encode()), strict=True))
    # A segment is written even if it is empty: a missing one would count as lost records.
    segments = {f"{checkpoint}-server-{partition}.npy": _npy(journal)}
    folders = {f"checkpoints/{checkpoint}": files, "journal": segments}
    for folder, contents in folders.items():
        for name, data in contents.items():
            run.write(f"{folder}/{name}", data)
    checksums = [{name: sha256(data).hexdigest() for name, data in contents.items()} for contents in folders.values()]
    settings = Settings.model_validate(state.metadata["settings"])
    return Part(partition, state.metadata["version"][1], state.metadata["epochs"], settings, *checksums)


def _npy(records: NDArray[np.void]) -> bytes:
    file = BytesIO()
    np.save(file, records, allow_pickle=False)
    return file.getvalue()


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
        folder = self.run.folder(f"checkpoints/{self.manifest.name}")
        tensors, values = _part_files(partition)
        try:
            arrays = load(folder.read(tensors))
            metadata = parse_document("server.json", folder.read(values, MOST_BYTES), f"{folder.url}/{values}")
        except (SafetensorError, ValueError, KeyError, OverflowError) as error:  # safetensors lets some of these pass
            raise CheckpointError(f"part {partition} of checkpoint {self.manifest.name}: {error}") from error
        _, start, stop, _ = metadata["partition"]
        weights = arrays.get("weights", np.empty(0))
        if weights.shape != (stop - start,) or weights.dtype != np.float32:
            raise CheckpointError(
                f"part {partition} of checkpoint {self.manifest.name}: {tensors} has no weights of {stop - start} "
                "values. Restore the directory from a copy, or delete it"
            )
        return ServerState(arrays, metadata)

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
        states = sorted(self.states(), key=lambda state: int(state.metadata["partition"][1]))
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
            return _is_complete(self._committed_text(name))
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
        if not _is_complete(text):
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


def _is_complete(text: bytes | None) -> bool:
    """Return True if a COMMITTED was written to its end. On some storage a crash may leave half of the file."""
    if not text or not text.startswith(b"{"):
        return bool(text)  # not the beginning of a manifest: a damaged file, not a truncated one
    return text.rstrip().endswith(b"}")


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
        checkpoint: Checkpoint | None = Checkpoints(Storage(run)).open(name)
    else:
        checkpoint = Checkpoints(folder).newest(refused=lambda _: None)
    if checkpoint is None:
        raise CheckpointError(f"there is no committed checkpoint in {folder.url}")
    return checkpoint.manifest.layout.views(checkpoint.weights(averaged))
