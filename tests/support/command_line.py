"""The command line as subprocesses, what they record, and waiting for it."""

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
LIMIT_S = 60.0  # no command takes longer, unless a test says so
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # after a crash they look for their Ray for a minute


@dataclass(frozen=True, slots=True)
class CommandLine:
    """Runs `psgd` in a folder."""

    environment: Mapping[str, str]
    folder: Path
    inside: tuple[str, ...] = ()  # what a command begins with that is to run on another host
    limit_s: float = LIMIT_S

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """A command from start to end."""
        with self.started(*arguments, **variables) as process:
            out, err = process.communicate(timeout=self.limit_s)
            return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    @contextmanager
    def started(self, *arguments: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
        """A command under way, in a process group of its own as in a shell; it is gone when the block ends."""
        with subprocess.Popen(
            [*self.inside, sys.executable, "-m", "psgd.cli", *arguments],
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
        """Command lines of all processes that were started from here, whoever their parent is by now."""
        marker = f"RAY_TMPDIR={self.environment['RAY_TMPDIR']}".encode()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it ended a moment ago, or is somebody else's
                if marker in (process / "environ").read_bytes().split(b"\0"):
                    found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        return [command for command in found if not command.startswith(AGENTS)]


def eventually(condition: Callable[[], object], within_s: float = LIMIT_S) -> None:
    """Wait until the condition holds.

    Raises:
        TimeoutError: it did not within the limit.
    """
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not so within {within_s} s")
        time.sleep(0.02)


def recorded(run: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind that a run has recorded so far."""
    file = run / "events.jsonl"
    events = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [event for event in events if event["event"] == kind]
