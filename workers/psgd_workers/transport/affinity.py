"""The processors that a thread runs on. The kernel picks them; who is waited for had best run where the waiting is."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Set as AbstractSet
from contextlib import suppress

__all__ = ["NOWHERE", "allowed_processors", "current_processor", "run_on", "wake"]

NOWHERE = 0xFFFF  # a number that no processor has

_getcpu = getattr(ctypes.CDLL(None), "sched_getcpu", None)  # Linux; Python does not offer it


def current_processor() -> int:
    """The number of the processor that this thread runs on at this moment; `NOWHERE`, if the system does not say."""
    return NOWHERE if _getcpu is None else int(_getcpu())


def allowed_processors() -> set[int]:
    """Those that this thread may run on; none, if the system does not say."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def run_on(processors: AbstractSet[int]) -> None:
    """Run this thread on those processors alone from now on. Nothing changes if all of them were taken from it."""
    with suppress(OSError):
        os.sched_setaffinity(0, processors)


def wake(patiently: bool) -> None:
    """Whether this thread, when it is woken, waits for its share of time, and interrupts nobody: see sched(7).

    Nothing changes where the system has no such policy as SCHED_BATCH, or where somebody chose another.
    """
    if hasattr(os, "SCHED_BATCH") and os.sched_getscheduler(0) in (os.SCHED_OTHER, os.SCHED_BATCH):
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH if patiently else os.SCHED_OTHER, os.sched_param(0))
