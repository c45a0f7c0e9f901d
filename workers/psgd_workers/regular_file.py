"""Opens a regular file for reading. A pipe, a device or a directory is refused instead of read without end."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import IO

__all__ = ["open_regular_file"]

KINDS = (  # of other files, as the error names them
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular_file(path: Path) -> IO[bytes]:
    """Open a file of known size, to read bytes.

    Raises:
        OSError: the file cannot be opened, or is no regular file.
        ValueError: no file can have this name.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe is opened without a wait for its writer
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    kind = next((name for is_kind, name in KINDS if is_kind(mode)), "something else")
    raise OSError(errno.EINVAL, f"it is {kind}; expected a regular file")
