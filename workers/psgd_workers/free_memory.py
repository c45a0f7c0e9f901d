"""The memory that this process may still take, on its machine and in its container."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["free_memory"]

MEMINFO = Path("/proc/meminfo")
OWN_CGROUPS = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")
CGROUP_FILES = (  # limit, usage, and the name of the page cache in memory.stat; for versions 2 and 1
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_memory() -> int:
    """Return the free bytes of this machine, or of this container; `sys.maxsize` if the system does not tell."""
    if not MEMINFO.exists():
        return sys.maxsize
    lines = MEMINFO.read_text(encoding="ascii").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return max(0, min([free, *(_free_in(group) for group in _control_groups())]))


def _control_groups() -> Iterator[Path]:
    """Yield the folder of this process's memory cgroup, and of each group around it, whose limit may be lower."""
    for line in OWN_CGROUPS.read_text(encoding="utf-8").splitlines() if OWN_CGROUPS.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):  # version 2 has one group for everything
            own = CGROUPS / controllers / path.lstrip("/")
            yield from (own, *own.parents[: len(Path(path).parts) - 1])


def _free_in(group: Path) -> int:
    """Return the bytes that a cgroup may still use; `sys.maxsize` if it has no limit.

    The inactive page cache counts as free: the kernel counts it as used, but drops it before it kills a process.
    """
    for limit, used, cache in CGROUP_FILES:
        if (group / limit).exists() and (text := (group / limit).read_text(encoding="ascii").strip()) != "max":
            numbers = dict(map(str.split, (group / "memory.stat").read_text(encoding="ascii").splitlines()))
            return int(text) - int((group / used).read_text(encoding="ascii")) + int(numbers[cache])
    return sys.maxsize
