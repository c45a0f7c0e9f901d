"""Ends processes of a test's own cluster, as a machine that fails would."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event

from tests.support.command_line import LIMIT_S

__all__ = ["Killer", "one_of", "processes"]


def processes(prefix: str, home: str) -> list[int]:
    """Return Ray's processes of that name that use this folder for Ray, of any parent."""
    marker = f"RAY_TMPDIR={home}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended a moment ago, or is somebody else's
            named = (process / "cmdline").read_bytes().startswith(prefix.encode())
            if named and marker in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return sorted(found)


def one_of(victims: Sequence[int], rng: random.Random) -> bool:
    """Kill one of these processes; false: there is none."""
    if not victims:
        return False
    with suppress(ProcessLookupError):  # it was faster
        os.kill(rng.choice(victims), signal.SIGKILL)
    return True


class Killer:
    """Kills something every so often.

    Args:
        ways: what it may do, by name: kill something at random, and say whether there was anything.
        weights: how often each is chosen.
        every_s: least and most seconds between two kills.
        times: how often in all.
        seed: decides what it hits, and when.

    Attributes:
        killed: the ways it went.
    """

    def __init__(
        self,
        ways: Mapping[str, Callable[[random.Random], bool]],
        weights: Sequence[int],
        every_s: tuple[float, float],
        times: int,
        seed: int,
    ) -> None:
        self._ways = ways
        self._weights = weights
        self._every_s = every_s
        self._times = times
        self._random = random.Random(seed)  # noqa: S311 (nothing here is a secret)
        self._done = Event()
        self.killed: list[str] = []

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """While the block lasts."""
        with ThreadPoolExecutor(1) as pool:
            work = pool.submit(self._work)
            try:
                yield
            finally:
                self._done.set()
            work.result(LIMIT_S)

    def _work(self) -> None:
        while len(self.killed) < self._times and not self._done.wait(self._random.uniform(*self._every_s)):
            (name,) = self._random.choices(list(self._ways), self._weights)
            if self._ways[name](self._random):
                self.killed.append(name)
