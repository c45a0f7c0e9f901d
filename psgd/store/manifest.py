"""The manifest of a checkpoint: the content of its file COMMITTED, which says what the checkpoint holds."""

from __future__ import annotations

from hashlib import sha256
from itertools import islice
from typing import Any, Literal

from pydantic import ValidationError

from psgd.errors import CheckpointError, DamagedFileError
from psgd.jsontext import RECOVERY, parse_json, to_json
from psgd.spec import Settings
from psgd.store.checkpoint_part import part_files
from psgd.store.records import describe
from psgd_workers.gradients.layout import Layout
from psgd_workers.spec import Spec

__all__ = ["Manifest", "is_complete"]

FORMAT = 1


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
        """Layout of the weights."""
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
        names = (name for partition in range(self.partitions) for name in part_files(partition))
        return list(islice((name for name in names if name not in self.files), 4))


def _checksum(fields: dict[str, Any]) -> str:
    return sha256(to_json(fields, sort_keys=True).encode()).hexdigest()


def _damaged(source: str, reason: str) -> DamagedFileError:
    return DamagedFileError(f"{source} is damaged ({reason}): {RECOVERY}")


def is_complete(text: bytes | None) -> bool:
    """Return True if a COMMITTED was written to its end. On some storage, a crash may leave half of the file.

    Args:
        text: content of the file; None if there is no such file.
    """
    if not text or not text.startswith(b"{"):
        return bool(text)  # not the beginning of a manifest: a damaged file, not a truncated one
    return text.rstrip().endswith(b"}")
