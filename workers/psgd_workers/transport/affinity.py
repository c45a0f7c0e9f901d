"""Processor affinity and scheduling of the calling thread.

A server thread answers sooner if it runs on the same processor as the worker that waits for the answer."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Set as AbstractSet
from contextlib import suppress

__all__ = ["NOWHERE", "allowed_processors", "current_processor", "run_on", "set_patient"]

NOWHERE = 0xFFFF  # stands for an unknown processor; no processor has this number

_getcpu = getattr(ctypes.CDLL(None), "sched_getcpu", None)  # Linux only; Python has no function for it


def current_processor() -> int:
    """Return the number of the processor that this thread runs on now; `NOWHERE` if the system cannot tell."""
    return NOWHERE if _getcpu is None else int(_getcpu())


def allowed_processors() -> set[int]:
    """Return the processors that this thread may run on; an empty set if the system cannot tell."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def run_on(processors: AbstractSet[int]) -> None:
    """Restrict this thread to `processors`. No-op if the process may no longer use any of them."""
    with suppress(OSError):
        os.sched_setaffinity(0, processors)


def set_patient(patient: bool) -> None:
    """Choose whether this thread, when it wakes, waits for its time slice instead of preempting another thread.

    A patient thread has the policy SCHED_BATCH of sched(7). No-op on systems without this policy, and if the thread
    has a policy other than SCHED_OTHER and SCHED_BATCH.

    Args:
        patient: True for SCHED_BATCH, False for SCHED_OTHER.
    """
    if hasattr(os, "SCHED_BATCH") and os.sched_getscheduler(0) in (os.SCHED_OTHER, os.SCHED_BATCH):
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH if patient else os.SCHED_OTHER, os.sched_param(0))
