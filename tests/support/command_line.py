"""Run `psgd` commands as subprocesses, wait for a condition, and read the events that a run recorded."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["DIGITS", "LIMIT_S", "CommandLine", "eventually", "recorded"]

DIGITS = str(Path(__file__).parents[2] / "deploy" / "jobs" / "digits.yaml")
LIMIT_S = 60.0  # default time limit of a command and of a wait
AGENTS = (
    "ray::DashboardAgent",
    "ray::RuntimeEnvAgent",
)  # Ray's agents: after a crash they try to reach Ray for up to a minute


@dataclass(frozen=True, slots=True)
class CommandLine:
    """Runs `psgd` commands in a folder.

    Attributes:
        environment: variables of each command; `RAY_TMPDIR` marks the processes that belong to it.
        folder: working directory of each command.
        prefix: words before each command, such as those that run it on another host.
        limit_s: time limit of `run`, in seconds.
    """

    environment: Mapping[str, str]
    folder: Path
    prefix: tuple[str, ...] = ()
    limit_s: float = LIMIT_S

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command until it ends, and return its exit code and output."""
        with self.started(*arguments, **variables) as process:
            out, err = process.communicate(timeout=self.limit_s)
            return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    @contextmanager
    def started(self, *arguments: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
        """Start a command in a process group of its own, as a shell does, and kill it when the block ends."""
        with subprocess.Popen(
            [*self.prefix, sys.executable, "-m", "psgd.cli", *arguments],
            cwd=self.folder,
            env={**self.environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def processes(self) -> list[str]:
        """Return the command lines of all processes that carry this `RAY_TMPDIR`, even if their parent has ended."""
        marker = f"RAY_TMPDIR={self.environment['RAY_TMPDIR']}".encode()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # the process has just ended, or belongs to another user
                if marker in (process / "environ").read_bytes().split(b"\0"):
                    found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        return [command for command in found if not command.startswith(AGENTS)]


def eventually(condition: Callable[[], object], within_s: float = LIMIT_S) -> None:
    """Wait until the condition holds.

    Args:
        condition: called again and again; its result is true when the wait may end.
        within_s: time limit, in seconds.

    Raises:
        TimeoutError: the condition did not hold within the limit.
    """
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the condition did not hold within {within_s} s")
        time.sleep(0.02)


def recorded(run: Path, kind: str) -> list[dict[str, Any]]:
    """Return the events of one kind that the run in this directory has recorded so far."""
    file = run / "events.jsonl"
    events = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [event for event in events if event["event"] == kind]
