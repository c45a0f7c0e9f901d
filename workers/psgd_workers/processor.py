"""The processor that a thread runs on: the kernel picks it, and whoever is waited for had best run there."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

__all__ = ["NOWHERE", "current_processor", "follow"]

NOWHERE = 0xFFFF  # a number that no processor has

_getcpu = getattr(ctypes.CDLL(None), "sched_getcpu", None)  # Linux; Python does not offer it


def current_processor() -> int:
    """The number of the processor that this thread runs on at this moment; `NOWHERE`, if the system does not say."""
    return NOWHERE if _getcpu is None else int(_getcpu())


def follow(processor: int) -> None:
    """Run this thread on that processor alone from now on; nothing changes if it may not run there."""
    with suppress(OSError):  # it is outside the set that this process is held to
        os.sched_setaffinity(0, {processor})
