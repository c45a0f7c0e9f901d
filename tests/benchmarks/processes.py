"""Children, titles and memory of processes, read from Linux' /proc."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

__all__ = ["Memory", "descendants", "memory", "title"]

PROC = Path("/proc")
MB = 1e6


class Memory(NamedTuple):
    """The memory of one process, in MB."""

    rss: float  # all pages in memory, shared pages included
    pss: float  # the same, with each shared page divided by the number of processes that map it
    own: float  # PSS without the pages of files

    @classmethod
    def of_rollup(cls, text: str) -> Memory:
        """Read `/proc/PID/smaps_rollup`."""
        lines = (line.split() for line in text.splitlines()[1:])  # such as "Pss:  1234 kB", after a first line of names
        kilobytes = {name.rstrip(":"): int(value) for name, value, *_ in lines}
        own = kilobytes["Pss_Anon"] + kilobytes["Pss_Shmem"]
        return cls(*(amount * 1024 / MB for amount in (kilobytes["Rss"], kilobytes["Pss"], own)))


def memory(pid: int) -> Memory:
    """Return the memory of a process.

    Raises:
        OSError: there is no such process.
    """
    return Memory.of_rollup((PROC / str(pid) / "smaps_rollup").read_text(encoding="ascii"))


def title(pid: int) -> str:
    """Return a process's title, which names the class of a Ray worker; empty if the process has ended."""
    try:
        return (PROC / str(pid) / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace").strip()
    except OSError:
        return ""


def descendants(pid: int) -> list[int]:
    """Return the children of a process, their children, and so on."""
    children: dict[int, list[int]] = {}
    for file in PROC.glob("[0-9]*/stat"):
        try:
            found = parent(file.read_text(encoding="utf-8", errors="replace"))
        except OSError:
            continue  # the process has just ended
        children.setdefault(found, []).append(int(file.parent.name))
    reached = []
    rest = [pid]
    while rest:
        mine = children.get(rest.pop(), [])
        reached += mine
        rest += mine
    return reached


def parent(stat: str) -> int:
    """Return the parent in the text of a `/proc/PID/stat`; the name in it may contain spaces and brackets."""
    return int(stat.rpartition(")")[2].split()[1])
