"""The process that compiles: its failures, its end with its parent, and turns among several."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from psgd.errors import NotCompiledError
from psgd.serving.compiled import compiler
from psgd.serving.compiled.compiler import compile_apart
from tests.support.server_harness import IS_COMPILED

LIMIT_S = 60.0
needs_numba = pytest.mark.skipif(not IS_COMPILED, reason="the push path is not compiled")


def python(script: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", script, *map(str, arguments)]


@contextmanager
def started(command: Sequence[str], **variables: object) -> Iterator[subprocess.Popen[str]]:
    """Run a command that does not outlast the block."""
    modules = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {name: str(value) for name, value in variables.items()} | {"PYTHONPATH": modules}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (python("raise SystemExit('the disk is full')"), "ended with 1: the disk is full"),
        (python("import os; os.kill(os.getpid(), 9)"), "ended with -9: "),
        (["/no/such/program"], "could be started: .*No such file"),
        (python("import threading; threading.Event().wait()"), "took longer than 0.5 s"),
    ],
    ids=["fails", "is killed", "cannot be started", "is too slow"],
)
def test_a_process_that_does_not_compile_is_an_error(
    monkeypatch: pytest.MonkeyPatch, command: list[str], message: str
) -> None:
    monkeypatch.setattr(compiler, "command", lambda folder: command)
    monkeypatch.setattr(compiler, "LIMIT_S", 0.5 if "longer" in message else LIMIT_S)
    files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with pytest.raises(NotCompiledError, match=message):
        compile_apart("unused")
    assert len(os.listdir("/proc/self/fd")) == files  # noqa: PTH208


# Compiling until the parent is gone

PARENT = """
import sys
from psgd.serving.compiled import compiler

compiler.command = lambda folder: [sys.executable, "-c", sys.argv[1], folder, sys.argv[3]]
compiler.compile_apart(sys.argv[2])
"""
BUSY = """
import sys, time
from psgd.serving.compiled.__main__ import end_with_parent

sign = open(sys.argv.pop(), "w")
end_with_parent()
print("begun", file=sign, flush=True)
while time.process_time() < 100:
    pass
"""
REAL = """
import sys
from numba.core import event
from psgd.serving.compiled.__main__ import main

sign = open(sys.argv.pop(), "w")

class Sign(event.Listener):
    def on_start(self, compiling):
        if compiling.data["dispatcher"].__name__ == "serve":
            print("begun", file=sign, flush=True)

    def on_end(self, compiling):
        pass

event.register("numba:compile", Sign())
main()
"""


@contextmanager
def sign(path: Path) -> Iterator[int]:
    """Make a named pipe, and yield a descriptor at which a test waits for a process that has the pipe open."""
    os.mkfifo(path)
    reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        yield reading
    finally:
        os.close(reading)


def received(reading: int) -> bytes:
    """Wait for data in the pipe, or for the end of the only process that could write into it: then return b""."""
    assert select.select([reading], [], [], LIMIT_S)[0], "nothing happened in the other process"
    return os.read(reading, 100)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize(
    "child", [BUSY, pytest.param(REAL, marks=[pytest.mark.chaos, needs_numba])], ids=["busy", "real"]
)
def test_it_ends_with_its_parent(tmp_path: Path, child: str, how: signal.Signals) -> None:
    with sign(tmp_path / "sign") as reading:
        with started(python(PARENT, child, tmp_path, tmp_path / "sign"), NUMBA_CACHE_DIR=tmp_path) as parent:
            assert received(reading) == b"begun\n", parent.communicate(timeout=LIMIT_S)
            parent.send_signal(how)
            parent.communicate(timeout=LIMIT_S)
        assert received(reading) == b""


TURNS = """
import os, sys
from pathlib import Path
from psgd.serving.compiled.__main__ import turn

folder = Path(sys.argv[1])
for _ in range(300):
    with turn(folder):
        (folder / "used").mkdir()
        (folder / "used").rmdir()
"""


def test_only_one_process_has_its_turn(tmp_path: Path) -> None:
    with started(python(TURNS, tmp_path)) as one, started(python(TURNS, tmp_path)) as other:
        ends = [(process.communicate(timeout=LIMIT_S), process.returncode) for process in (one, other)]
    assert [code for _, code in ends] == [0, 0], ends


# A server with an empty cache

SERVER = """
import os
import sys
from itertools import count
from threading import Thread

import numpy as np

from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.partitions import Partition
from psgd.serving.compiled import compiler
from psgd.serving.host import ServerHost
from psgd.serving.turns import take_short_turns
from psgd_workers.messages import Version
from tests.support.jobs import GRID, START, job, push

compiler.command = lambda folder: [sys.executable, "-c", sys.argv[1], folder, *sys.argv[2:]]
os.nice(15)  # as Ray does
take_short_turns()
host = ServerHost(ParameterServer(job(), Partition(0, 0, 6, 6), START, GRID, Version(1, 0)))
host.join("worker-0")
thread = Thread(target=host.compile)

def push_next(number):
    epoch, position = divmod(number, GRID.num_batches)
    version = host.server.version
    host.push(push(GRID.batch(epoch, position), version, number=number + 1), lambda receipt: None)
    assert host.server.version.updates == number + 1

thread.start()
"""
PUSHES_MEANWHILE = """
for number in count():
    push_next(number)
    if not thread.is_alive():
        break
print(number, host.compiled is not None)
"""
PUSHES_AFTERWARDS = """
thread.join()
push_next(0)
print(1, host.compiled is not None)
"""
COUNTED = """
import sys
from psgd.serving.compiled.__main__ import main

told = sys.argv.pop()
main()
from psgd.serving.compiled.serve import serve
print(sum(serve.stats.cache_misses.values()), file=open(told, "a"))
"""


@needs_numba
@pytest.mark.parametrize(
    ("child", "reason"),
    [("raise SystemExit('the disk is full')", "the disk is full"), ("", "has no code of begin_tag for this server")],
    ids=["fails", "leaves no code"],
)
def test_python_serves_after_one_warning_if_nothing_is_compiled(tmp_path: Path, child: str, reason: str) -> None:
    with started(python(SERVER + PUSHES_AFTERWARDS, child), NUMBA_CACHE_DIR=tmp_path) as server:
        out, warnings = server.communicate(timeout=LIMIT_S)
    assert (server.returncode, out.split()[1]) == (0, "False"), warnings
    (warning,) = warnings.splitlines()
    assert warning.startswith("the push path is not compiled, so pushes take longer: ")
    assert warning.endswith(reason)


@needs_numba
@pytest.mark.chaos
def test_servers_of_one_machine_serve_while_one_process_compiles_for_all(tmp_path: Path) -> None:
    told = tmp_path / "told"
    command = python(SERVER + PUSHES_MEANWHILE, COUNTED, told)
    with started(command, NUMBA_CACHE_DIR=tmp_path) as one, started(command, NUMBA_CACHE_DIR=tmp_path) as other:
        ends = [server.communicate(timeout=2 * LIMIT_S) for server in (one, other)]
    assert [one.returncode, other.returncode] == [0, 0], ends
    assert [warnings for _, warnings in ends] == ["", ""]
    for out, _ in ends:
        pushes, is_compiled = out.split()
        assert (int(pushes) > 10_000, is_compiled) == (True, "True")
    assert sorted(told.read_text().split()) == ["0", "1"]
