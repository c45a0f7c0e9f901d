"""The owner of a run: the driver that may commit. Other processes can look up whether it still exists."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

__all__ = ["Owner", "this_machine"]

ENDED_STATES = ("Z", "X")  # states of an ended process, in /proc/PID/stat


@dataclass(frozen=True, slots=True)
class Owner:
    """The driver that a run belongs to."""

    driver: str  # random id
    incarnation: int  # incarnation of the server that the driver started last; higher than any before
    host: str
    pid: int
    started: float  # time when the driver took over the run, Unix seconds
    machine: str  # `this_machine()` of the driver: only there `pid` has a meaning
    process_start: int | None  # start of the process, clock ticks since boot; None if the system does not say

    @classmethod
    def this_process(cls, incarnation: int) -> Owner:
        """Return this process as a new driver, for a run that it takes over."""
        pid = os.getpid()
        return cls(uuid4().hex, incarnation, socket.gethostname(), pid, time.time(), this_machine(), _start_ticks(pid))

    @property
    def is_here(self) -> bool:
        """True if the driver was started on this machine, so that its process can be looked up."""
        return self.machine == this_machine()

    @property
    def is_alive(self) -> bool:
        """True if the driver's process still exists. Only valid where `is_here` is True."""
        if Path("/proc/self/stat").exists():
            start = _start_ticks(self.pid)
            return start is not None and start == self.process_start
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True


def this_machine() -> str:
    """Return a name for the scope of process ids: the host, its boot and its namespace of process ids."""
    boot = _read("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {boot} {namespace.readlink() if namespace.exists() else ''}".strip()


def _start_ticks(pid: int) -> int | None:
    """Return the start time of a process in clock ticks since boot; None if there is no such process."""
    state, *fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split() or ["X"]
    return None if state in ENDED_STATES else int(fields[18])  # field 22 of the line; `fields` begins with field 4


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:  # no such file, or no such process
        return ""
