"""The C library's heap, in a process that makes large copies in several threads."""

from __future__ import annotations

import ctypes

__all__ = ["return_large_blocks"]

M_MMAP_THRESHOLD = -3  # glibc's malloc.h
LARGE = 256 * 1024  # bytes


def return_large_blocks() -> None:
    """Give every large block back to the kernel as soon as it is freed; nothing, if the C library cannot.

    glibc gives blocks of their own mapping back at once. But with the first one freed it raises the size from which
    blocks get one, and keeps the next ones of that size in the heap of whichever thread made them: every thread that
    ever copied a large vector then holds on to memory for one.
    See https://man7.org/linux/man-pages/man3/mallopt.3.html.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE)
