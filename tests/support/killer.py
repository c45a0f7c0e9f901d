"""Kill processes of a test's own cluster at random, as failing machines would."""

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

__all__ = ["Killer", "kill_one", "ray_processes"]


def ray_processes(prefix: str, home: str) -> list[int]:
    """Return the process ids of a test's Ray, sorted.

    Args:
        prefix: beginning of the command line.
        home: the `RAY_TMPDIR` of the test.
    """
    marker = f"RAY_TMPDIR={home}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # the process has just ended, or belongs to another user
            named = (process / "cmdline").read_bytes().startswith(prefix.encode())
            if named and marker in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return sorted(found)


def kill_one(victims: Sequence[int], rng: random.Random) -> bool:
    """Kill one of these processes at random. Return False if there is none."""
    if not victims:
        return False
    with suppress(ProcessLookupError):  # it ended by itself
        os.kill(rng.choice(victims), signal.SIGKILL)
    return True


class Killer:
    """Kills processes or hosts again and again while a block lasts.

    Args:
        ways: kinds of kills by name; each kills something at random and returns True if there was something to kill.
        weights: relative frequency of each kind.
        every_s: least and most seconds between two kills.
        times: number of kills after which it ends.
        seed: decides the times, the kinds and the victims.

    Attributes:
        killed: kinds of the kills so far, in order.
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
        """Kill while the block lasts."""
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
