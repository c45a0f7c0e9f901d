"""Checkpoints: a directory each, never renamed, whole if and only if its COMMITTED is there and its checksums hold.

    checkpoints/000007-2/        the seventh, written by incarnation 2
      server-0.safetensors       weights, optimizer state and applied sets of partition 0
      server-0.json              its versions and counts
      COMMITTED                  the Manifest, written last, by the driver alone

Servers write their parts themselves; only names and checksums travel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
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
from psgd.jsontext import parse_json, to_json
from psgd.spec import Settings
from psgd.store.storage import Storage
from psgd_workers.gradients.layout import Layout
from psgd_workers.messages import FloatArray
from psgd_workers.spec import Spec

__all__ = ["Checkpoint", "Checkpoints", "Manifest", "Part", "load_weights", "write_part"]

FORMAT = 1
NAME = re.compile(r"\d+-\d+")


@dataclass(frozen=True, slots=True)
class Part:
    """What one server wrote."""

    partition: int
    updates: int
    epochs: int
    settings: Settings  # by which the server went on
    files: Mapping[str, str]  # name in the checkpoint's directory -> SHA-256
    journal: Mapping[str, str]  # name in the journal's directory -> SHA-256


class Manifest(Spec):
    """The content of COMMITTED."""

    format: Literal[1]
    """Of this file and of the parts."""
    name: str
    """The directory's name."""
    incarnation: int
    """Of the servers that wrote it."""
    updates: int
    """Steps in the weights, of the partition that is least far."""
    epochs: int
    """Complete epochs, likewise."""
    seed: int
    """Of the job."""
    spec_hash: str
    """`JobSpec.identity_hash()`."""
    settings: Settings
    """As they were, `psgd set` included."""
    data_fingerprint: str
    """`Dataset.fingerprint`."""
    names: tuple[str, ...]
    """`Layout.names`."""
    shapes: tuple[tuple[int, ...], ...]
    """`Layout.shapes`."""
    num_trainable: int
    """`Layout.num_trainable`."""
    partitions: int
    """How many parts."""
    requeued: int
    """Batches leased again so far."""
    files: dict[str, str]
    """Every file of the directory and its SHA-256, this one left out."""
    journal: dict[str, str]
    """Journal segments written with it, likewise."""

    @property
    def layout(self) -> Layout:
        return Layout(self.names, self.shapes, self.num_trainable)


def write_part(run: Storage, checkpoint: str, state: ServerState, journal: NDArray[np.void]) -> Part:
    """Write one server's part of a checkpoint, and its journal since the last one.

    Args:
        run: the run directory.
        checkpoint: the directory's name.
        state: of the server.
        journal: records of `psgd.core.server.journal.RECORD`.

    Raises:
        StorageError: something could not be written.
    """
    partition = state.metadata["partition"][0]
    files = {
        f"server-{partition}.safetensors": save({name: np.ascontiguousarray(a) for name, a in state.arrays.items()}),
        f"server-{partition}.json": to_json(state.metadata).encode(),
    }
    segments = {f"{checkpoint}-server-{partition}.npy": _npy(journal)}  # even if empty: a gap would be a loss
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
        """What one server needs to go on.

        Raises:
            CheckpointError: the part is not what a server wrote.
        """
        folder = self.run.folder(f"checkpoints/{self.manifest.name}")
        path = f"server-{partition}.json"
        try:
            arrays = load(folder.read(f"server-{partition}.safetensors"))
            metadata: dict[str, Any] = parse_json(folder.read(path), f"{folder.url}/{path}")
        except (SafetensorError, DamagedFileError) as error:
            raise CheckpointError(f"part {partition} of checkpoint {self.manifest.name}: {error}") from error
        return ServerState(arrays, metadata)

    def states(self) -> list[ServerState]:
        """What every server wrote."""
        return [self.state(number) for number in range(self.manifest.partitions)]

    def cut(self, partition: Partition, servers: int) -> ServerState:
        """What one of so many servers needs to go on; the checkpoint may be of another number.

        Raises:
            CheckpointError: a part is not what a server wrote, or the parts do not agree.
        """
        if servers == self.manifest.partitions:
            return self.state(partition.number)
        states = self.states()
        if reason := disagreement(states):
            raise CheckpointError(f"checkpoint {self.manifest.name} cannot be cut for {servers} servers: {reason}")
        return repartition(states, partition)

    def weights(self, averaged: bool = False) -> FloatArray:
        """The flat weights of all partitions; or, of what is trained, their moving average.

        Raises:
            CheckpointError: the job keeps no average.
        """
        states = sorted(self.states(), key=lambda state: int(state.metadata["partition"][1]))
        if averaged:
            for state in states:
                if "average" not in state.arrays:
                    raise CheckpointError(
                        f"checkpoint {self.manifest.name} has no average: its job sets no optimizer.ema"
                    )
                state.arrays["weights"][: len(state.arrays["average"])] = state.arrays["average"]
        return np.concatenate([state.arrays["weights"] for state in states])


class Checkpoints:
    """The checkpoints of one run.

    Args:
        run: the run directory.
    """

    def __init__(self, run: Storage) -> None:
        self._run = run

    def names(self) -> list[str]:
        """Oldest first, committed or not."""
        return sorted((name for name in self._run.names("checkpoints") if NAME.fullmatch(name)), key=_order)

    def committed(self) -> list[str]:
        """Oldest first; one whose COMMITTED is cut short was never committed."""
        return [name for name in self.names() if _is_whole(self._committed_text(name))]

    def _committed_text(self, name: str) -> bytes:
        """What COMMITTED says; nothing, if it is not there."""
        path = f"checkpoints/{name}/COMMITTED"
        return self._run.read(path) if self._run.exists(path) else b""

    def next_number(self) -> int:
        """One more than any directory has, whole or not."""
        return max((int(name.partition("-")[0]) for name in self.names()), default=0) + 1

    def commit(self, manifest: Manifest) -> None:
        """Make a checkpoint whole."""
        self._run.write(f"checkpoints/{manifest.name}/COMMITTED", manifest.model_dump_json(indent=2).encode())

    def newest(
        self, refused: Callable[[str], None], fits: Callable[[Checkpoint], str | None] | None = None
    ) -> Checkpoint | None:
        """The newest checkpoint that is whole, and of use.

        Args:
            refused: told about every newer one that was committed, and is damaged or of no use.
            fits: tells why one that is whole is of no use; None: it is. Default: each is.

        Returns:
            None: no whole one is of use.

        Raises:
            CheckpointError: there are committed ones, and all are damaged.
        """
        faults = []
        whole = False
        for name in reversed(self.names()):
            try:
                if (text := self._committed_text(name)) and not _is_whole(text):
                    refused(f"checkpoint {name} was not committed: its COMMITTED is cut short")
                if not _is_whole(text):
                    continue
                checkpoint = self.open(name)
            except (CheckpointError, StorageError) as error:
                faults.append(str(error))
                refused(f"{error}; the one before it is tried")
                continue
            whole = True
            if (reason := fits(checkpoint) if fits else None) is None:
                return checkpoint
            refused(f"checkpoint {name} {reason}; the one before it is tried")
        if faults and not whole:
            raise CheckpointError(f"every checkpoint in {self._run.url} is damaged: {'; '.join(faults)}")
        return None

    def open(self, name: str) -> Checkpoint:
        """A checkpoint, after checking it.

        Raises:
            CheckpointError: it is not committed, of another format, or a checksum fails.
        """
        folder = self._run.folder(f"checkpoints/{name}")
        manifest = self.manifest(name)
        for file, checksum in manifest.files.items():
            if not folder.exists(file) or sha256(folder.read(file)).hexdigest() != checksum:
                raise CheckpointError(f"checkpoint {name}: {file} is missing, or its checksum is not the committed one")
        return Checkpoint(self._run, manifest)

    def manifest(self, name: str) -> Manifest:
        """What was committed; whether the files still are that is not checked.

        Raises:
            CheckpointError: nothing was, or it is of another format.
        """
        text = self._committed_text(name)
        if not _is_whole(text):
            raise CheckpointError(f"checkpoint {name} in {self._run.url} was never committed")
        return _parse_manifest(name, text)

    def prune(self, keep: int) -> list[str]:
        """Delete all but the newest `keep` committed ones, and what older ones a crash left unfinished.

        Returns:
            The names of the committed ones that were deleted.
        """
        committed = self.committed()
        doomed = committed[:-keep]
        for name in doomed:
            self._run.delete(f"checkpoints/{name}/COMMITTED")  # first: half a directory must not look whole
        newest = _order(committed[-1]) if committed else ()
        for name in self.names():
            if name in doomed or (name not in committed and _order(name) < newest):
                self._run.delete(f"checkpoints/{name}")
        return doomed


def _order(name: str) -> tuple[int, ...]:
    return tuple(map(int, name.split("-")))


def _is_whole(text: bytes) -> bool:
    """Whether a COMMITTED was written to its end: where files appear byte by byte, a crash may leave half of it."""
    if not text.startswith(b"{"):
        return bool(text)  # it is no manifest, and never was
    try:
        parse_json(text, "COMMITTED")
    except DamagedFileError:
        return False
    return True


def _parse_manifest(name: str, text: bytes) -> Manifest:
    try:
        tree = parse_json(text, "COMMITTED")
        if isinstance(tree, dict) and tree.get("format") != FORMAT:
            raise CheckpointError(
                f"checkpoint {name} has format {tree.get('format')!r}, and this psgd reads format {FORMAT}: "
                "use the psgd that wrote it"
            )
        return Manifest.model_validate_json(text)
    except (ValidationError, DamagedFileError) as error:
        raise CheckpointError(f"checkpoint {name}: its COMMITTED is not a manifest: {error}") from error


def load_weights(path: str | PathLike[str], averaged: bool = False) -> dict[str, FloatArray]:
    """Return the named weights that a run saved last.

    Args:
        path: a run's directory, or one checkpoint's directory inside it: a string, a `Path` or an fsspec URL.
        averaged: return the moving average that `optimizer.ema` asks for instead of the weights themselves.

    Returns:
        Tensor name -> float32 array, buffers included.

    Raises:
        StorageError: `path` is neither a path nor a URL that can be opened.
        CheckpointError: there is no whole checkpoint, or no average in it.

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
