"""The log of a run: lines added to files. Storage that takes no lines for a while does not stop a run that trains."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from psgd.errors import StorageError
from psgd.store.storage import Storage

__all__ = ["Log"]

ANSWER_S = 5.0  # that the driver waits for a line to be written: meanwhile it leases nothing
RETRY_S = 10.0  # after a failure
MOST_KEPT = 10_000  # lines of a file, the newest, while they cannot be written


class Log:
    """Lines, added to files of a folder in their order.

    Args:
        storage: the folder.

    Attributes:
        storage: likewise, but impatient once faults are borne.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._tell: Callable[[str], None] | None = None  # of the first fault; None: faults are raised
        self._told = False
        self._kept: dict[str, deque[bytes]] = {}  # lines that were not written yet, by file
        self._torn: set[str] = set()  # files that may end in half a line
        self._retry_at = 0.0

    def bear_faults(self, tell: Callable[[str], None]) -> None:
        """From now on nothing raises StorageError: lines wait until they can be written, and the first fault is told.

        Args:
            tell: is given it.
        """
        self._tell = tell
        self.storage = Storage(self.storage.url, min(ANSWER_S, self.storage.patience_s))

    def add(self, file: str, line: bytes) -> None:
        """Add a line."""
        self._kept.setdefault(file, deque(maxlen=MOST_KEPT)).append(line)
        self.attempt(self._write)

    @property
    def rests(self) -> bool:
        """True while the storage is left alone, because it failed a moment ago."""
        return time.monotonic() < self._retry_at

    def attempt(self, action: Callable[[], None], last: bool = False) -> None:
        """Do something with the storage, unless it failed a moment ago; `last`: there is no later."""
        if self._tell is None:
            action()
            return
        if self.rests and not last:
            return
        try:
            action()
        except StorageError as error:
            self._retry_at = time.monotonic() + RETRY_S
            if not self._told:
                self._tell(f"{error}. Training goes on, and the log is written when that is possible again")
            self._told = True

    def close(self) -> None:
        """Write what is left."""
        self.attempt(self._write, last=True)

    def _write(self) -> None:
        for file, lines in list(self._kept.items()):
            whole = file not in self._torn
            self._torn.add(file)
            self.storage.append(file, (b"" if whole else b"\n") + b"".join(lines))
            self._torn.discard(file)
            del self._kept[file]
