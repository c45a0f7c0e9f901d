"""Refuses data that does not fit into memory, before the kernel kills a process for it."""

from __future__ import annotations

from psgd_workers.errors import DataError
from psgd_workers.free_memory import free_memory

__all__ = ["check_memory", "too_large"]


def check_memory(name: str, needed: int) -> None:
    """Check that memory is free for a part of the data.

    Args:
        name: name of the part for the message.
        needed: bytes that the part takes in memory.

    Raises:
        DataError: fewer bytes are free on this machine, or in this container.
    """
    if needed > (free := free_memory()):
        raise too_large(name, f"{needed / 2**20:,.0f} MiB of memory, but {free / 2**20:,.0f} MiB are free here")


def too_large(name: str, needed: str) -> DataError:
    """Return the error for data that does not fit into memory."""
    return DataError(f"{name} needs {needed}: use a machine with more memory, or fewer or smaller examples")
