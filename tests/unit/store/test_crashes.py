"""Kills of a process that writes checkpoints, at random moments: committed checkpoints stay whole."""

from __future__ import annotations

import os
import signal
import struct
import time
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from psgd.core.server.state import ServerState
from psgd.store.checkpoint_part import write_part
from psgd.store.checkpoints import Checkpoints
from psgd.store.storage import Storage
from tests.support.checkpoints import NO_RECORDS, fail, manifest, state

KILLS = 120
KEEP = 2
NUMBER = struct.Struct("<I")


def numbered(partition: int, number: int) -> ServerState:
    """Return a state in which every value is the number of its checkpoint."""
    made = state(partition, updates=number)
    arrays = {name: np.full_like(array, number) for name, array in made.arrays.items()}
    return ServerState(arrays, made.metadata)


def write(run: Storage, number: int, committed: int) -> None:
    """Write and commit a checkpoint, and then write its number to the pipe `committed`."""
    name = f"{number:06d}-1"
    parts = [write_part(run, name, numbered(partition, number), NO_RECORDS) for partition in (0, 1)]
    Checkpoints(run).commit(manifest(name, parts))
    os.write(committed, NUMBER.pack(number))
    Checkpoints(run).prune(KEEP)


def write_for_ever(run: Storage, committed: int) -> None:
    """Write checkpoints as fast as possible."""
    for number in count(Checkpoints(run).next_number()):
        write(run, number, committed)


def kill_a_writer(run: Storage, after_s: float, commits: bool) -> int:
    """Fork a process that writes checkpoints, and kill it.

    Args:
        run: the folder to write to.
        after_s: time from the start to the kill, seconds.
        commits: True to count the time from the first committed checkpoint instead.

    Returns:
        The number of the newest checkpoint that the process reported as committed; 0 if it reported none.
    """
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            write_for_ever(run, tell)
        finally:
            os._exit(1)  # the child must not return into pytest
    os.close(tell)
    first = os.read(told, NUMBER.size) if commits else b""
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the writer ended by itself"
    with os.fdopen(told, "rb") as pipe:
        numbers = first + pipe.read()
    return int(NUMBER.unpack(numbers[-NUMBER.size :])[0]) if numbers else 0


def test_whatever_moment_a_writer_is_killed_at_the_newest_checkpoint_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)  # slow, and needed only for power failures
    run = Storage(str(tmp_path / "run"))
    random = np.random.default_rng(7)
    newest = 1
    began = time.monotonic()
    write(run, 1, os.open(os.devnull, os.O_WRONLY))
    took_s = time.monotonic() - began
    written = unfinished = 0
    for kill in range(KILLS):
        first = Checkpoints(run).next_number()  # higher than newest + 1 if an unfinished one lies between
        told = kill_a_writer(run, random.uniform(0, 2 * took_s), commits=kill % 4 == 3)
        written += told > newest
        newest = max(newest, told)
        checkpoint = Checkpoints(run).newest(refused=fail)
        unfinished += len(Checkpoints(run).names()) - len(Checkpoints(run).committed())
        assert checkpoint is not None
        number = checkpoint.manifest.updates
        # The process may have been killed before it reported its last commit.
        assert newest <= number <= max(newest, told + 1 if told else first)
        newest = number
        for part in checkpoint.states():
            assert all((array == np.full_like(array, number)).all() for array in part.arrays.values())
            assert part.metadata["version"][1] == number
    Checkpoints(run).prune(KEEP)
    assert len(Checkpoints(run).committed()) == KEEP
    assert written > 5, "the writer was always killed before it committed anything"
    assert unfinished > 5, "the writer was never killed in the middle of a checkpoint"
