"""The log of a run: lines appended to `events.jsonl` and `metrics.jsonl`.

Storage that fails for a while does not stop a run that trains: lines are kept in memory until they can be written.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from psgd.errors import StorageError
from psgd.store.storage import Storage

__all__ = ["EventLog"]

ANSWER_S = 5.0  # limit for writing a line; meanwhile the driver waits and leases no batch
RETRY_S = 10.0  # from a failure to the next attempt
MOST_KEPT = 10_000  # lines kept per file while they cannot be written; older lines are dropped


class EventLog:
    """Log files in a folder, whose lines are appended in order.

    Args:
        storage: the folder.
        check_owner: called before lines are written. It may raise a `StorageError`, after which they are written later,
            or any other error, after which they are not written.

    Attributes:
        storage: the folder, with a time limit of `ANSWER_S` once faults are tolerated.
    """

    def __init__(self, storage: Storage, check_owner: Callable[[], None] = lambda: None) -> None:
        self.storage = storage
        self._check_owner = check_owner
        self._report: Callable[[str], None] | None = None  # called with the first fault; None: faults are raised
        self._reported = False  # True once a fault was reported
        self._unwritten: dict[str, deque[bytes]] = {}  # file -> lines that were not written yet
        self._torn: set[str] = set()  # files whose last line may be incomplete
        self._retry_at = 0.0

    def tolerate_faults(self, report: Callable[[str], None]) -> None:
        """Raise no StorageError from now on. Lines wait until they can be written.

        Args:
            report: called with a sentence about the first fault.
        """
        self._report = report
        self.storage = Storage(self.storage.url, min(ANSWER_S, self.storage.patience_s))

    def add(self, file: str, line: bytes) -> None:
        """Append a line to a file, now or when the storage works again."""
        self._unwritten.setdefault(file, deque(maxlen=MOST_KEPT)).append(line)
        self.attempt(self._write)

    @property
    def is_paused(self) -> bool:
        """True while the storage is not used, because it failed less than `RETRY_S` ago."""
        return time.monotonic() < self._retry_at

    def attempt(self, action: Callable[[], None], last: bool = False) -> None:
        """Use the storage, unless it failed a moment ago.

        Args:
            action: uses the storage.
            last: True to try in any case, because there is no later attempt.

        Raises:
            StorageError: the action failed, and faults are not tolerated yet.
        """
        if self._report is None:
            action()
            return
        if self.is_paused and not last:
            return
        try:
            action()
        except StorageError as error:
            self._retry_at = time.monotonic() + RETRY_S
            if not self._reported:
                self._report(f"{error}. Training goes on, and the log is written as soon as the storage works again")
            self._reported = True

    def close(self) -> None:
        """Write all lines that were not written yet."""
        self.attempt(self._write, last=True)

    def _write(self) -> None:
        self._check_owner()
        for file, lines in list(self._unwritten.items()):
            whole = file not in self._torn
            self._torn.add(file)
            self.storage.append(file, (b"" if whole else b"\n") + b"".join(lines))
            self._torn.discard(file)
            del self._unwritten[file]
