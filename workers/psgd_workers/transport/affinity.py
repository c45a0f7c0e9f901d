"""The processor on which a worker runs, so that the server's thread can answer it there."""

from __future__ import annotations

import ctypes

__all__ = ["NOWHERE", "current_processor"]

NOWHERE = 0xFFFF  # stands for an unknown processor; no processor has this number

_getcpu = getattr(ctypes.CDLL(None), "sched_getcpu", None)  # Linux only; Python has no function for it


def current_processor() -> int:
    """Return the number of the processor that this thread runs on now; `NOWHERE` if the system cannot tell."""
    number = -1 if _getcpu is None else int(_getcpu())
    return number if number >= 0 else NOWHERE
