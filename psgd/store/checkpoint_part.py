"""A part of a checkpoint: the files in which one server's state is saved.

checkpoints/NAME/server-0.safetensors    weights, optimizer state and applied sets of partition 0
checkpoints/NAME/server-0.json           versions and counts of partition 0
journal/NAME-server-0.npy                the journal of partition 0 since the checkpoint before
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from psgd.core.server.state import ServerState
from psgd.errors import CheckpointError
from psgd.jsontext import MOST_BYTES, to_json
from psgd.spec import Settings
from psgd.store.records import parse_document
from psgd.store.storage import Storage

__all__ = ["Part", "part_files", "read_part", "write_part"]


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a checkpoint that one server wrote."""

    partition: int
    updates: int
    epochs: int  # complete epochs
    settings: Settings  # settings of the server when it wrote the part
    files: Mapping[str, str]  # name in the checkpoint's directory -> SHA-256
    journal: Mapping[str, str]  # name in the journal's directory -> SHA-256


def part_files(partition: int) -> tuple[str, str]:
    """Return the names of a part's files in the checkpoint's directory: arrays, and metadata."""
    return f"server-{partition}.safetensors", f"server-{partition}.json"


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
    partition = state.partition.number
    arrays = save({name: np.ascontiguousarray(array) for name, array in state.arrays.items()})
    files = dict(zip(part_files(partition), (arrays, to_json(state.metadata).encode()), strict=True))
    # A segment is written even if it is empty: a missing one would count as lost records.
    segments = {f"{checkpoint}-server-{partition}.npy": _npy(journal)}
    folders = {f"checkpoints/{checkpoint}": files, "journal": segments}
    for folder, contents in folders.items():
        for name, data in contents.items():
            run.write(f"{folder}/{name}", data)
    checksums = [{name: sha256(data).hexdigest() for name, data in contents.items()} for contents in folders.values()]
    return Part(partition, state.version.updates, state.epochs, state.settings, *checksums)


def _npy(records: NDArray[np.void]) -> bytes:
    file = BytesIO()
    np.save(file, records, allow_pickle=False)
    return file.getvalue()


def read_part(run: Storage, checkpoint: str, partition: int) -> ServerState:
    """Return the state that the server of a partition saved. Its files' checksums are not checked.

    Args:
        run: the folder of the run.
        checkpoint: name of the checkpoint.
        partition: number of the partition.

    Raises:
        CheckpointError: the part does not hold what a server writes.
    """
    folder = run.folder(f"checkpoints/{checkpoint}")
    tensors, values = part_files(partition)
    try:
        arrays = load(folder.read(tensors))
        metadata = parse_document("server.json", folder.read(values, MOST_BYTES), f"{folder.url}/{values}")
    except (SafetensorError, ValueError, KeyError, OverflowError) as error:  # safetensors lets some of these pass
        raise CheckpointError(f"part {partition} of checkpoint {checkpoint}: {error}") from error
    _, start, stop, _ = metadata["partition"]
    weights = arrays.get("weights", np.empty(0))
    if weights.shape != (stop - start,) or weights.dtype != np.float32:
        raise CheckpointError(
            f"part {partition} of checkpoint {checkpoint}: {tensors} has no weights of {stop - start} values. "
            "Restore the directory from a copy, or delete it"
        )
    return ServerState(arrays, metadata)
