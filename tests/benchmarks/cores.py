"""Time of a message between two cores: a cache line goes from one to the other and back.

The processors of a virtual machine may share an L3 cache at one time and not at another. A worker and a server then
exchange the same weights more slowly, so a speed is shown beside this time. It describes the moment before a run only,
because it can change every few seconds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from time import perf_counter_ns
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

__all__ = ["ROUND_TRIPS", "compiled_exchange", "round_trip_ns", "shown"]

ROUND_TRIPS = 20_000
TRIES = 5  # the least time counts: a thread that is preempted loses more than a whole try takes
START_S = 10.0  # time limit for the start of both threads

Exchange: TypeAlias = Callable[[NDArray[np.int64], int, int], None]


def round_trip_ns() -> float | None:
    """Return the time in which a cache line goes from the first core of this process to the second and back, in ns.

    Returns:
        The time; None if this process may use only one core, or if there is no Numba.
    """
    processors = sorted(os.sched_getaffinity(0))[:2]
    if len(processors) < 2:
        return None
    try:
        exchange = compiled_exchange()
    except ImportError:
        return None
    return min(_timed_ns(exchange, processors) for _ in range(TRIES)) / ROUND_TRIPS


def shown(time_ns: float | None) -> str:
    """Return the time as text; empty if it could not be measured."""
    return "" if time_ns is None else f"cores {time_ns:,.0f} ns apart"


@cache
def compiled_exchange() -> Exchange:
    """Compile the loop of one thread, which takes a second.

    Raises:
        ImportError: there is no Numba.
    """
    from numba import njit

    from psgd.serving.compiled.native import fence

    def exchange(counter: NDArray[np.int64], parity: int, times: int) -> None:
        """Raise the counter each time that the other thread has raised it: one when it is even, one when it is odd."""
        done = 0
        while done < times:
            fence()  # so that the counter is read again
            if counter[0] % 2 == parity:
                counter[0] += 1
                done += 1

    compiled = cast(Exchange, njit(nogil=True)(exchange))
    compiled(np.zeros(1, np.int64), 0, 0)  # compiles it
    return compiled


def _timed_ns(exchange: Exchange, processors: Sequence[int]) -> int:
    """Return the time of all round trips between a thread on each processor, in ns."""
    counter = np.zeros(64, np.int64)  # the first is used; the others keep its cache line free
    start = Barrier(len(processors))

    def take_part(parity: int) -> int:
        os.sched_setaffinity(0, {processors[parity]})  # of this thread
        start.wait(START_S)
        began = perf_counter_ns()
        exchange(counter, parity, ROUND_TRIPS)
        return perf_counter_ns() - began

    with ThreadPoolExecutor(len(processors)) as threads:
        return max(threads.map(take_part, range(len(processors))))
