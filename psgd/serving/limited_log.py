"""A log with a limit: hostile connections must not fill the disk."""

from __future__ import annotations

import logging
from math import inf
from threading import Lock
from time import monotonic

__all__ = ["LimitedLog"]

PERIOD_S = 10.0
MAX_LINES = 50  # lines in a period; the others are only counted

log = logging.getLogger("psgd.lanes")


class LimitedLog:
    """Logs warnings about connections, at most `MAX_LINES` in each period of `PERIOD_S` seconds. Thread-safe."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._period_began = -inf
        self._lines = 0
        self._left_out = 0

    def warning(self, message: str, *arguments: object) -> None:
        """Log a line, as `logging.warning` does, or only count it."""
        with self._lock:
            left_out = self._start_period(monotonic())
            self._lines += 1
            is_over = self._lines > MAX_LINES
            self._left_out += is_over
        self._log_left_out(left_out)
        if not is_over:
            log.warning(message, *arguments)

    def close(self) -> None:
        """Log how many lines were left out since the last report of that number."""
        with self._lock:
            left_out = self._start_period(inf)
        self._log_left_out(left_out)

    def _start_period(self, now: float) -> int:
        """Start a period if the last one is over. Return the number of lines that the last one left out."""
        if now - self._period_began < PERIOD_S:
            return 0
        left_out = self._left_out
        self._period_began = now
        self._lines = 0
        self._left_out = 0
        return left_out

    @staticmethod
    def _log_left_out(number: int) -> None:
        if number:
            log.warning("%s more lines about connections were left out", number)
