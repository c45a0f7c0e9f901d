"""Facts about processes from Linux' /proc: children, titles and memory."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

__all__ = ["Memory", "descendants", "memory", "title"]

PROC = Path("/proc")
MB = 1e6


class Memory(NamedTuple):
    """Of one process, in MB."""

    rss: float  # what it has in memory, shared pages and all
    pss: float  # likewise, of each shared page only its share: less as soon as others map the same libraries
    own: float  # PSS without pages of files

    @classmethod
    def of_rollup(cls, text: str) -> Memory:
        """Read `/proc/PID/smaps_rollup`."""
        lines = (line.split() for line in text.splitlines()[1:])  # the first is of the mapping, "Pss:  1234 kB" follow
        kilobytes = {name.rstrip(":"): int(value) for name, value, *_ in lines}
        own = kilobytes["Pss_Anon"] + kilobytes["Pss_Shmem"]
        return cls(*(amount * 1024 / MB for amount in (kilobytes["Rss"], kilobytes["Pss"], own)))


def memory(pid: int) -> Memory:
    """Of a process that is there.

    Raises:
        OSError: it is not.
    """
    return Memory.of_rollup((PROC / str(pid) / "smaps_rollup").read_text(encoding="ascii"))


def title(pid: int) -> str:
    """Return a process's title, which names the class of a Ray worker; empty if the process is gone."""
    try:
        return (PROC / str(pid) / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace").strip()
    except OSError:
        return ""


def descendants(pid: int) -> list[int]:
    """A process's children, and theirs."""
    children: dict[int, list[int]] = {}
    for file in PROC.glob("[0-9]*/stat"):
        try:
            found = parent(file.read_text(encoding="utf-8", errors="replace"))
        except OSError:
            continue  # it ended meanwhile
        children.setdefault(found, []).append(int(file.parent.name))
    reached = []
    rest = [pid]
    while rest:
        mine = children.get(rest.pop(), [])
        reached += mine
        rest += mine
    return reached


def parent(stat: str) -> int:
    """Of the process whose `/proc/PID/stat` that is; its name may hold blanks and brackets."""
    return int(stat.rpartition(")")[2].split()[1])
