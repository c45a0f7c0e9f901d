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
    files = {
        f"server-{partition}.safetensors": save({name: np.ascontiguousarray(a) for name, a in state.arrays.items()}),
        f"server-{partition}.json": to_json(state.metadata).encode(),
    }
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
        path = f"server-{partition}.json"
        try:
            arrays = load(folder.read(f"server-{partition}.safetensors"))
            metadata: dict[str, Any] = parse_json(folder.read(path), f"{folder.url}/{path}")
        except (SafetensorError, DamagedFileError) as error:
            raise CheckpointError(f"part {partition} of checkpoint {self.manifest.name}: {error}") from error
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
        return np.concatenate([state.arrays["weights"] for state in states])


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
        return [name for name in self.names() if _is_complete(self._committed_text(name))]

    def _committed_text(self, name: str) -> bytes:
        """Return the content of COMMITTED, which is empty if there is no such file."""
        path = f"checkpoints/{name}/COMMITTED"
        return self._run.read(path) if self._run.exists(path) else b""

    def next_number(self) -> int:
        """Return the number after the highest of all checkpoints, whole or not."""
        return max((int(name.partition("-")[0]) for name in self.names()), default=0) + 1

    def commit(self, manifest: Manifest) -> None:
        """Commit a checkpoint, all parts of which are written."""
        self._run.write(f"checkpoints/{manifest.name}/COMMITTED", manifest.model_dump_json(indent=2).encode())

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
            CheckpointError: there are committed checkpoints, but all are damaged.
        """
        faults = []
        whole = False
        for name in reversed(self.names()):
            try:
                if (text := self._committed_text(name)) and not _is_complete(text):
                    refused(f"checkpoint {name} was not committed: its COMMITTED is cut short")
                if not _is_complete(text):
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
            CheckpointError: the checkpoint is not committed, or has another format.
        """
        text = self._committed_text(name)
        if not _is_complete(text):
            raise CheckpointError(f"checkpoint {name} in {self._run.url} was never committed")
        return _parse_manifest(name, text)

    def prune(self, keep: int) -> list[str]:
        """Delete committed checkpoints except the newest `keep`, and older ones that a crash left unfinished.

        Returns:
            The names of the committed checkpoints that were deleted.
        """
        committed = self.committed()
        deleted = committed[:-keep]
        for name in deleted:
            # COMMITTED first, so that a half-deleted directory does not count as whole.
            self._run.delete(f"checkpoints/{name}/COMMITTED")
        newest = _order(committed[-1]) if committed else ()
        for name in self.names():
            if name in deleted or (name not in committed and _order(name) < newest):
                self._run.delete(f"checkpoints/{name}")
        return deleted


def _order(name: str) -> tuple[int, ...]:
    return tuple(map(int, name.split("-")))


def _is_complete(text: bytes) -> bool:
    """Return True if a COMMITTED was written to its end. On some storage a crash may leave half of the file."""
    if not text.startswith(b"{"):
        return bool(text)  # not the beginning of a manifest: a damaged file, not a truncated one
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
