"""Memory that worker and server on one node share.

A worker owns one `Segment`: for each batch that it may have in hand, the weights that it reads and the gradient that it
writes. A server owns one `PublishedVector`: the weights that workers read, with a counter by which a reader knows that
its copy is of one version. Both are `memfd_create` files whose size is sealed. They are passed on as file descriptors
and have no name, so that the kernel frees them when the last process that uses them has ended.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import platform
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from psgd_workers.errors import SharedMemoryError
from psgd_workers.free_memory import free_memory
from psgd_workers.messages import FloatArray, Version

__all__ = ["PublishedVector", "Segment", "Slot", "has_shared_memory", "stores_are_ordered"]

PAGE = mmap.PAGESIZE
HEADER = 64  # bytes before the values of a published vector: one cache line
SNAPSHOTS = 3  # attempts of a reader, after which it asks the server for a copy
SEQUENCE, INCARNATION, UPDATES = range(3)  # indices of the header's fields, 8 bytes each
F_SEAL_FUTURE_WRITE = 0x0010  # since Linux 5.1; the module fcntl has it since Python 3.13


def has_shared_memory() -> bool:
    """Return True if this system has anonymous shared memory that can be sealed, as Linux has."""
    return hasattr(os, "memfd_create") and hasattr(fcntl, "F_ADD_SEALS")


def stores_are_ordered() -> bool:
    """Return True if other processors see stores in the order in which a processor makes them.

    `PublishedVector.snapshot` is correct only on such processors.
    """
    return platform.machine().lower() in ("x86_64", "amd64")


def _check_free(needed: int) -> None:
    """Raise SharedMemoryError if `needed` bytes are not free. Otherwise the kernel might kill a process for them."""
    free = free_memory()
    if needed > free:
        raise SharedMemoryError(
            f"{needed / 2**20:,.1f} MiB of shared memory are needed, but only {free / 2**20:,.1f} MiB are free"
        )


class Slot(NamedTuple):
    """A worker's memory for one batch in hand."""

    weights: FloatArray  # [num_parameters], float32: the weights that were pulled
    gradient: FloatArray  # [num_parameters], float32


class Segment:
    """A worker's memory: for each slot the weights and the gradient of all partitions.

    Args:
        num_parameters: values of the whole weights.
        slots: number of slots: batches that the worker may have in hand.
        file: descriptor of another process's segment, which is mapped and then closed; None: create a segment, in
            private memory if memory cannot be shared.

    Attributes:
        slots: the slots, as views of the memory.
        values: the whole memory, float32.
        file: descriptor to pass to another process; None: this memory is private, or the descriptor is closed.
        fault: reason why this memory is private; "" if it is shared.

    Raises:
        SharedMemoryError: `file` is not such a segment.
    """

    def __init__(self, num_parameters: int, slots: int, file: int | None = None) -> None:
        stride = -(-num_parameters * 4 // PAGE) * PAGE  # bytes of one vector, in whole pages
        size = 2 * slots * stride
        self.file: int | None = None
        self.fault = ""
        memory: mmap.mmap | bytearray
        try:
            shared = _create("psgd-segment", size) if file is None else _check_received(file, size)
            memory = _map(shared, size)
            self.file = shared
        except SharedMemoryError as error:
            if file is not None:
                raise
            self.fault = str(error)
            memory = bytearray(size)
        vectors = [np.frombuffer(memory, np.float32, num_parameters, offset) for offset in range(0, size, stride)]
        self.slots = tuple(Slot(*pair) for pair in zip(vectors[::2], vectors[1::2], strict=True))
        self.values: FloatArray = np.frombuffer(memory, np.float32)
        self._stride = stride // 4
        if file is not None:
            self.close()  # the mapping stays

    def starts(self, first: int) -> tuple[list[int], list[int]]:
        """Return, for each slot, the indices in `values` of a value of its gradient and of its weights.

        Args:
            first: index of the value in each vector.
        """
        slots = range(len(self.slots))
        gradients = [(2 * slot + 1) * self._stride + first for slot in slots]
        return gradients, [2 * slot * self._stride + first for slot in slots]

    def close(self) -> None:
        """Close the descriptor. The memory lives as long as its arrays."""
        if self.file is not None:
            os.close(self.file)
            self.file = None


class PublishedVector:
    """A server's weights in shared memory, which workers read while the server changes them.

    This is a sequence lock: the server increments a counter before and after each change, so that it is odd during a
    change. A copy is of one version if the counter was the same even number before and after copying.

    Args:
        size: values of the partition.
        file: descriptor of a server's vector, which is mapped for reading and then closed; None: create a vector that
            only this process can write.

    Attributes:
        values: the weights, `[size]`, float32.
        counts: `[8]`, int64: sequence number, incarnation and updates; the other fields are not used.
        file: the owner's descriptor, to pass to workers.

    Raises:
        SharedMemoryError: `file` is not such a vector, or no memory can be shared.
    """

    def __init__(self, size: int, file: int | None = None) -> None:
        length = HEADER + 4 * size
        owned = file is None
        self.file = _create("psgd-weights", length) if file is None else _check_received(file, length)
        memory = _map(self.file, length, mmap.PROT_READ | (mmap.PROT_WRITE if owned else 0))
        if owned:
            _forbid_others_to_write(self.file)
        else:
            os.close(self.file)
        self.counts: NDArray[np.int64] = np.frombuffer(memory, np.int64, HEADER // 8)
        self._counts = self.counts.data  # Python reads and writes these in a third of the time
        self.values: FloatArray = np.frombuffer(memory, np.float32, size, HEADER)

    def close(self) -> None:
        """Close the owner's descriptor. The memory lives as long as its array."""
        os.close(self.file)

    def begin(self) -> None:
        """Announce that the values are about to change."""
        self._counts[SEQUENCE] += 1

    def end(self, version: Version) -> None:
        """Announce that the values have changed and now are of `version`."""
        self._counts[INCARNATION], self._counts[UPDATES] = version
        self._counts[SEQUENCE] += 1

    @property
    def version(self) -> Version:
        """Return the newest published version."""
        # One vector has one incarnation, so the two reads cannot be of different versions.
        return Version(self._counts[INCARNATION], self._counts[UPDATES])

    def snapshot(self, into: FloatArray) -> Version | None:
        """Copy the values of one version.

        Args:
            into: vector `[size]` that is overwritten.

        Returns:
            The version that was copied; None: the values changed during each of three attempts, and `into` must not be
            used.
        """
        counts = self._counts
        for _ in range(SNAPSHOTS):
            before = counts[SEQUENCE]
            if before % 2 == 0:
                np.copyto(into, self.values)
                updates = counts[UPDATES]
                if counts[SEQUENCE] == before:
                    return Version(counts[INCARNATION], updates)
            os.sched_yield()  # the writer may be waiting for this processor
        return None


def _create(name: str, size: int) -> int:
    """Return the descriptor of a new memory file of `size` bytes, whose size is sealed."""
    if not has_shared_memory():
        raise SharedMemoryError("this system has no anonymous shared memory: only Linux has it")
    try:
        _check_free(size)
        file = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:  # for example, too many open files
        raise SharedMemoryError(f"no memory can be shared: {error}") from error
    try:
        os.ftruncate(file, size)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError as error:
        os.close(file)
        raise SharedMemoryError(f"no memory can be shared: {error}") from error
    return file


def _forbid_others_to_write(file: int) -> None:
    """Let no other process map the file for writing. Close the file if the kernel cannot do that."""
    try:
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
    except OSError as error:
        os.close(file)
        raise SharedMemoryError(
            f"memory cannot be shared for reading only, which Linux can since version 5.1: {error}"
        ) from error


def _map(file: int, size: int, prot: int = mmap.PROT_READ | mmap.PROT_WRITE) -> mmap.mmap:
    """Return the file as memory. Close it if it cannot be mapped."""
    try:
        return mmap.mmap(file, size, prot=prot)
    except OSError as error:
        os.close(file)
        raise SharedMemoryError(f"shared memory of {size} bytes cannot be mapped: {error}") from error


def _check_received(file: int, size: int) -> int:
    """Return a descriptor that another process has passed, or close it and raise SharedMemoryError.

    A process that reads behind the end of a mapped file is killed. So the file must be long enough and never shrink.
    """
    found = os.fstat(file).st_size
    try:
        seals = fcntl.fcntl(file, fcntl.F_GET_SEALS)
    except OSError as error:
        os.close(file)
        raise SharedMemoryError(f"the descriptor that was passed is no shared memory: {error}") from error
    if found != size or not seals & fcntl.F_SEAL_SHRINK:
        os.close(file)
        raise SharedMemoryError(
            f"shared memory of {found} bytes with seals {seals:#x} was passed; expected {size} bytes, sealed in size"
        )
    return file
