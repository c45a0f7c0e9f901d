"""Foreign files: untrusted entries of a local folder that any process may write to, and the way to take them out.

Files are opened relative to the folder's descriptor, and no link is followed. A process that replaces an entry in the
meantime can therefore not make the driver open another file.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from uuid import uuid4

__all__ = ["MOST_SCANNED", "TakenFile", "read_regular", "size_fault", "take_files"]

MOST_SCANNED = 1000  # entries of the folder that one call looks at


@dataclass(frozen=True, slots=True)
class TakenFile:
    """An entry that was taken out of a folder."""

    name: str
    data: bytes | None  # content of the file; None if it was not read
    fault: str  # reason why it was not read, or empty


def size_fault(most_bytes: int) -> str:
    """Return the reason why a large file is not read."""
    return f"it has more than {most_bytes} bytes"


def take_files(folder: str, refused: str, number: int, most_bytes: int, taken: set[str]) -> list[TakenFile]:
    """Take entries out of a folder on this machine; see `Storage.take_out`.

    Args:
        folder: path of the folder.
        refused: path of the folder for entries that are no regular files.
        number: largest number of entries to take.
        most_bytes: largest size of a file that is read.
        taken: names of entries that were taken before, but could not be deleted. This call updates the set.

    Returns:
        The entries, sorted by name.

    Raises:
        OSError: the path is not a folder, is a link to a folder, or cannot be read.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return []
    try:
        with os.scandir(descriptor) as entries:
            names = sorted(entry.name for entry in islice(entries, MOST_SCANNED) if not entry.name.startswith("."))
        new = [name for name in names if name not in taken][:number]
        found = [_read(descriptor, name, most_bytes) for name in new]
        taken.update(file.name for file in found)
        for name in names:
            if name in taken and _remove(descriptor, name, refused):
                taken.discard(name)
        return found
    finally:
        os.close(descriptor)


def read_regular(path: str, most_bytes: int | None) -> bytes | None:
    """Return the content of a file, or `most_bytes` + 1 bytes of a larger one; None if it is not a regular file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe does not wait for a writer
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return None
        if most_bytes is None or status.st_size <= most_bytes:
            return file.read()  # with a limit, as many bytes would be allocated, also for a short file
        return file.read(most_bytes + 1)


def _read(folder: int, name: str, most_bytes: int) -> TakenFile:
    try:
        if not stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            return TakenFile(name, None, "it is not a regular file")
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError as error:
        return TakenFile(name, None, f"it cannot be read: {error.strerror}")
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return TakenFile(name, None, "it is not a regular file")
        data = file.read(most_bytes + 1)
    return TakenFile(name, data, "") if len(data) <= most_bytes else TakenFile(name, None, size_fault(most_bytes))


def _remove(folder: int, name: str, refused: str) -> bool:
    """Delete a regular file, or move any other entry into the folder `refused`. Return False if that fails."""
    try:
        if stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            os.unlink(name, dir_fd=folder)
        else:
            Path(refused).mkdir(exist_ok=True)
            os.rename(name, f"{refused}/{uuid4().hex}", src_dir_fd=folder)
    except OSError:
        return False
    return True
