"""The virtual clock: all happens on a heap of (time, number, what), so that a run is a function of its arguments."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from heapq import heappop, heappush
from itertools import count
from typing import Any

__all__ = ["VirtualClock", "without_collector"]


class VirtualClock:
    """What happens at one instant happens in the order in which it was asked for.

    Attributes:
        now: virtual seconds.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = count()

    def at(self, time_s: float, happen: Callable[..., None], *arguments: Any) -> None:
        """Let something happen at an instant."""
        heappush(self._heap, (time_s, next(self._numbers), happen, arguments))

    def after(self, delay_s: float, happen: Callable[..., None], *arguments: Any) -> None:
        """Let something happen later."""
        self.at(self.now + delay_s, happen, *arguments)

    def advance(self, until: float) -> bool:
        """Go to what happens next, and let it happen; or to `until`, if that is sooner.

        Returns:
            Whether anything happened.
        """
        if not self._heap or until < self._heap[0][0]:
            assert until < float("inf"), "nothing will ever happen again"
            self.now = max(self.now, until)
            return False
        self.now, _, happen, arguments = heappop(self._heap)
        happen(*arguments)
        return True


@contextmanager
def without_collector() -> Iterator[None]:
    """No cyclic garbage is made here, and looking for it among a thousand workers costs an eighth of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
