"""Ends processes of a test's own cluster, as a machine that fails would."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

from tests.integration.commands import LIMIT_S

__all__ = ["Killer", "processes"]


def processes(prefix: str, home: str) -> list[int]:
    """Those of Ray's processes of that name that were started with this folder for Ray, whoever their parent is."""
    marker, found = f"RAY_TMPDIR={home}".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended a moment ago, or is somebody else's
            named = (process / "cmdline").read_bytes().startswith(prefix.encode())
            if named and marker in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return sorted(found)


class Killer:
    """Kills one of these every so often.

    Args:
        home: the folder of the cluster's Ray.
        prefixes: names of processes, one of which is chosen each time.
        every_s: least and most seconds between two kills.
        times: how often in all.
        seed: decides whom it hits, and when.
    """

    def __init__(
        self, home: str, prefixes: tuple[str, ...], every_s: tuple[float, float], times: int, seed: int
    ) -> None:
        self._home = home
        self._prefixes = prefixes
        self._every_s = every_s
        self._times = times
        self._random = random.Random(seed)  # noqa: S311 (nothing here is a secret)
        self._done = Event()
        self.killed: list[str] = []

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """While the block lasts."""
        thread = Thread(target=self._work)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join(LIMIT_S)

    def _work(self) -> None:
        while len(self.killed) < self._times and not self._done.wait(self._random.uniform(*self._every_s)):
            prefix = self._random.choice(self._prefixes)
            if victims := processes(prefix, self._home):
                with suppress(ProcessLookupError):  # it was faster
                    os.kill(self._random.choice(victims), signal.SIGKILL)
                    self.killed.append(prefix)
