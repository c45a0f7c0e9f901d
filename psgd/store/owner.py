"""The owner of a run: the driver that may commit, and how others find out that its process is gone."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

__all__ = ["Owner", "this_machine"]

GONE = ("Z", "X")  # states of a process that has ended, in /proc/PID/stat


@dataclass(frozen=True, slots=True)
class Owner:
    """The driver that a run belongs to."""

    driver: str  # random
    incarnation: int  # of the server it started last: one more than any before
    host: str
    pid: int
    started: float  # Unix time, seconds
    machine: str  # `this_machine()`, where `pid` has a meaning
    process_start: int | None  # clock ticks from boot to the process's start; None: the system does not tell

    @classmethod
    def this_process(cls, incarnation: int) -> Owner:
        """Return a new owner: the driver in this process."""
        pid = os.getpid()
        return cls(uuid4().hex, incarnation, socket.gethostname(), pid, time.time(), this_machine(), _start(pid))

    @property
    def is_here(self) -> bool:
        """Return True if the driver was started on this machine, so that its process can be looked for."""
        return self.machine == this_machine()

    @property
    def is_alive(self) -> bool:
        """Return True if the driver's process still exists; `is_here` must hold."""
        if Path("/proc/self/stat").exists():
            return _start(self.pid) == self.process_start is not None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True


def this_machine() -> str:
    """Return a name for what process ids belong to: the host, its boot and the namespace of process ids."""
    boot = _read("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {boot} {namespace.readlink() if namespace.exists() else ''}".strip()


def _start(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; None if there is no such process."""
    state, *fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split() or ["X"]
    return None if state in GONE else int(fields[18])  # field 22 of the line, of which 2 stand before the state


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:  # there is no such file, or no such process any more
        return ""
