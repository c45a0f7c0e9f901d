"""Memory that worker and server of one node share: nameless, so that nothing is left of it when its last user is gone.

A worker owns one `Segment`: for each batch it may have in hand, the weights it reads and the gradient it writes. A
server owns one `PublishedVector`: the weights that workers are shown, with a counter that tells a reader whether what
it copied was of one version. Both are `memfd_create` files, sealed in their size, and travel as file descriptors.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from psgd_workers.errors import SharedMemoryError
from psgd_workers.messages import FloatArray, Version

__all__ = ["PublishedVector", "Segment", "Slot", "free_memory", "has_shared_memory", "stores_are_ordered"]

MEMINFO = Path("/proc/meminfo")
OWN_CGROUPS = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")
CGROUP_FILES = (  # limit, what is used of it, and the name of the page cache in memory.stat: in versions 2 and 1
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
PAGE = mmap.PAGESIZE
HEADER = 64  # bytes before a published vector's values: a cache line
SNAPSHOTS = 3  # attempts of a reader before it lets the server copy
SEQUENCE, INCARNATION, UPDATES, CROWD = range(4)  # places in the header, 8 bytes each
F_SEAL_FUTURE_WRITE = 0x0010  # Linux 5.1; no constant of Python's before 3.13


def has_shared_memory() -> bool:
    """Whether this system has nameless shared memory that can be sealed: Linux."""
    return hasattr(os, "memfd_create") and hasattr(fcntl, "F_ADD_SEALS")


def stores_are_ordered() -> bool:
    """Whether others see this processor's stores in their order, which a reader beside a writer relies on."""
    return platform.machine().lower() in ("x86_64", "amd64")


def _check_free(needed: int) -> None:
    """Refuse what would not fit, before the kernel has to kill somebody for it."""
    free = free_memory()
    if needed > free:
        raise SharedMemoryError(
            f"{needed / 2**20:,.1f} MiB of shared memory are needed, and {free / 2**20:,.1f} MiB are free"
        )


def free_memory() -> int:
    """Return the bytes that this machine, or this container, can still give; all there are, if the system says none."""
    if not MEMINFO.exists():
        return sys.maxsize
    lines = MEMINFO.read_text(encoding="ascii").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return max(0, min([free, *(_left(group) for group in _control_groups())]))


def _control_groups() -> Iterator[Path]:
    """Yield the folders of this process' memory cgroups: its own, and those around it, which may be smaller."""
    for line in OWN_CGROUPS.read_text(encoding="utf-8").splitlines() if OWN_CGROUPS.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):  # version 2 has one group for everything
            own = CGROUPS / controllers / path.lstrip("/")
            yield from (own, *own.parents[: len(Path(path).parts) - 1])


def _left(group: Path) -> int:
    """Return the bytes that a cgroup has left; all there are, if it has no limit.

    The page cache counts as used, but what of it was not read lately is given up before a process is killed.
    """
    for limit, used, cache in CGROUP_FILES:
        if (group / limit).exists() and (text := (group / limit).read_text(encoding="ascii").strip()) != "max":
            numbers = dict(map(str.split, (group / "memory.stat").read_text(encoding="ascii").splitlines()))
            return int(text) - int((group / used).read_text(encoding="ascii")) + int(numbers[cache])
    return sys.maxsize


class Slot(NamedTuple):
    """Where a worker has one batch in hand."""

    weights: FloatArray  # [num_parameters], as read
    gradient: FloatArray  # [num_parameters]


class Segment:
    """A worker's memory: `slots` times [weights | gradient], contiguous over all partitions.

    Args:
        num_parameters: values of the whole weights.
        slots: batches in hand.
        file: descriptor of another process's segment, to be mapped; it is closed. None: a new one, shared if the
            system can.

    Attributes:
        slots: what lies in it.
        file: descriptor to pass on; None: this memory is private.
        fault: why it is private.

    Raises:
        SharedMemoryError: `file` is not such a segment.
    """

    def __init__(self, num_parameters: int, slots: int, file: int | None = None) -> None:
        stride = -(-num_parameters * 4 // PAGE) * PAGE  # of one vector, in bytes
        size = 2 * slots * stride
        self.file: int | None = None
        self.fault = ""
        memory: mmap.mmap | bytearray
        try:
            shared = _create("psgd-segment", size) if file is None else _received(file, size)
            memory = _mapped(shared, size)
            self.file = shared
        except SharedMemoryError as error:
            if file is not None:
                raise
            self.fault = str(error)
            memory = bytearray(size)
        vectors = [np.frombuffer(memory, np.float32, num_parameters, offset) for offset in range(0, size, stride)]
        self.slots = tuple(Slot(*pair) for pair in zip(vectors[::2], vectors[1::2], strict=True))
        if file is not None:
            self.close()  # the mapping stays

    def close(self) -> None:
        """Keep the memory, which lives as long as its arrays, and let go of the descriptor."""
        if self.file is not None:
            os.close(self.file)
            self.file = None


class PublishedVector:
    """A server's weights, read by others while they change.

    Before a change the counter is made odd, after it even; a copy between two equal even counts is of one version.

    Args:
        size: values.
        file: descriptor of a server's vector, to be read; it is closed. None: a new one, to be written by this process
            alone.

    Attributes:
        values: `[size]`.
        file: descriptor to pass on.

    Raises:
        SharedMemoryError: `file` is not such a vector, or no memory can be shared.
    """

    def __init__(self, size: int, file: int | None = None) -> None:
        length = HEADER + 4 * size
        owned = file is None
        self.file = _create("psgd-weights", length) if file is None else _received(file, length)
        memory = _mapped(self.file, length, mmap.PROT_READ | (mmap.PROT_WRITE if owned else 0))
        if owned:
            fcntl.fcntl(self.file, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)  # nobody else ever writes to it
        else:
            os.close(self.file)
        self._counts = memoryview(memory)[:HEADER].cast("q")
        self.values: FloatArray = np.frombuffer(memory, np.float32, size, HEADER)

    def close(self) -> None:
        """Let go of the owner's descriptor; the memory lives as long as its array."""
        os.close(self.file)

    def begin(self) -> None:
        """The values are about to change."""
        self._counts[SEQUENCE] += 1

    def end(self, version: Version) -> None:
        """They have changed, and are of that version now."""
        self._counts[INCARNATION], self._counts[UPDATES] = version
        self._counts[SEQUENCE] += 1

    @property
    def version(self) -> Version:
        """The newest that was published. The incarnation never changes, so one word decides."""
        return Version(self._counts[INCARNATION], self._counts[UPDATES])

    @property
    def poller(self) -> int:
        """Workers of this machine that the owner serves with one thread; it alone sets this."""
        return self._counts[CROWD]

    @poller.setter
    def poller(self, workers: int) -> None:
        self._counts[CROWD] = workers

    def snapshot(self, into: FloatArray) -> Version | None:
        """Copy the values as they were at one version.

        Args:
            into: `[size]`, overwritten.

        Returns:
            That version; None: they changed during each of three copies, and `into` holds nothing of use.
        """
        counts = self._counts
        for _ in range(SNAPSHOTS):
            before = counts[SEQUENCE]
            if before % 2 == 0:
                np.copyto(into, self.values)
                version = Version(counts[INCARNATION], counts[UPDATES])
                if counts[SEQUENCE] == before:
                    return version
            os.sched_yield()  # the writer may be waiting for this very core
        return None


def _create(name: str, size: int) -> int:
    if not has_shared_memory():
        raise SharedMemoryError("this system has no nameless shared memory, as Linux has")
    try:
        _check_free(size)
        file = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:  # too many open files, say
        raise SharedMemoryError(f"no memory can be shared: {error}") from error
    try:
        os.ftruncate(file, size)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError as error:
        os.close(file)
        raise SharedMemoryError(f"no memory can be shared: {error}") from error
    return file


def _mapped(file: int, size: int, prot: int = mmap.PROT_READ | mmap.PROT_WRITE) -> mmap.mmap:
    """The file as memory; it is closed if that fails."""
    try:
        return mmap.mmap(file, size, prot=prot)
    except OSError as error:
        os.close(file)
        raise SharedMemoryError(f"shared memory of {size} bytes cannot be mapped: {error}") from error


def _received(file: int, size: int) -> int:
    """Check what came: a shorter file, or one that could shrink, would kill whoever reads behind its end."""
    found = os.fstat(file).st_size
    try:
        seals = fcntl.fcntl(file, fcntl.F_GET_SEALS)
    except OSError as error:
        os.close(file)
        raise SharedMemoryError(f"what came is no shared memory: {error}") from error
    if found != size or not seals & fcntl.F_SEAL_SHRINK:
        os.close(file)
        raise SharedMemoryError(
            f"shared memory of {found} bytes came, seals {seals:#x}; expected {size} bytes, sealed in size"
        )
    return file
