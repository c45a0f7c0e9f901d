"""Settings of the C library's malloc for a process that makes large copies in several threads."""

from __future__ import annotations

import ctypes

__all__ = ["return_large_blocks"]

M_MMAP_THRESHOLD = -3  # glibc's malloc.h
LARGE = 256 * 1024  # bytes from which a block gets a mapping of its own


def return_large_blocks() -> None:
    """Return every large block to the kernel as soon as it is freed. No-op if the C library has no `mallopt`.

    glibc gives a large block a mapping of its own, and returns it as soon as it is freed. But when the first such block
    is freed, glibc raises the size from which blocks get a mapping, and keeps later blocks of that size in the heap of
    the thread that allocated them. Every thread that ever copied a large vector would then keep memory for one. A fixed
    threshold prevents that. See https://man7.org/linux/man-pages/man3/mallopt.3.html.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE)
