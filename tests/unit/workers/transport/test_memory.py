from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from psgd_workers.errors import SharedMemoryError
from psgd_workers.messages import FloatArray, Version
from psgd_workers.transport import memory
from psgd_workers.transport.memory import PublishedVector, Segment
from tests.support.server_harness import open_files

if not memory.has_shared_memory():
    pytest.skip("needs Linux' anonymous shared memory", allow_module_level=True)

PAGE = mmap.PAGESIZE
SIZE = 100_003  # values: copying takes long enough that a writer interferes
SNAPSHOTS = 100  # snapshots of different versions to take
LIMIT_S = 20.0

WRITER = """
import socket, sys
import numpy as np
from psgd_workers.transport.memory import PublishedVector
from psgd_workers.messages import Version

channel, size = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
vector, other = PublishedVector(size), np.ones(size, np.float32)
vector.begin()
vector.values[:] = 0
vector.end(Version(1, 0))
socket.send_fds(channel, [b"\\0"], [vector.file])
version = 0
while True:
    version += 1
    vector.begin()
    vector.values[:] = version
    vector.end(Version(1, version))
    for _ in range(version % 16):
        np.sqrt(other, out=other)
"""
OWNER = """
import os, socket, sys
from psgd_workers.transport.memory import PublishedVector, Segment

segment, vector = Segment(1000, 2), PublishedVector(1000)
socket.send_fds(socket.socket(fileno=int(sys.argv[1])), [b"\\0"], [segment.file, vector.file])
print(os.fstat(segment.file).st_ino, os.fstat(vector.file).st_ino, flush=True)
vector.begin()
sys.stdin.read()
"""
READER = """
import socket, sys
from psgd_workers.transport.memory import PublishedVector, Segment

_, (segment, vector), _, _ = socket.recv_fds(socket.socket(fileno=int(sys.argv[1])), 1, 2)
mapped = Segment(1000, 2, segment), PublishedVector(1000, vector)
print("mapped", flush=True)
sys.stdin.read()
"""


@contextmanager
def process(script: str, channel: socket.socket, *arguments: int) -> Iterator[subprocess.Popen[str]]:
    """Start a process that gets one end of a channel, and kill it at the end."""
    command = [sys.executable, "-c", script, *map(str, (channel.fileno(), *arguments))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, pass_fds=[channel.fileno()], **pipes) as running:  # type: ignore[call-overload]
        channel.close()
        try:
            yield running
        finally:
            running.kill()
            running.wait(LIMIT_S)


def line(of: subprocess.Popen[str]) -> str:
    assert of.stdout is not None
    ready, _, _ = select.select([of.stdout], [], [], LIMIT_S)
    assert ready, "the process said nothing in time"
    return of.stdout.readline()


def is_open(file: int) -> bool:
    try:
        os.fstat(file)
    except OSError:
        return False
    return True


# Segment


def test_a_segment_has_two_vectors_for_each_slot_each_on_pages_of_its_own() -> None:
    segment = Segment(1500, 3)
    vectors = [vector for slot in segment.slots for vector in slot]
    assert [vector.shape for vector in vectors] == [(1500,)] * 6
    assert {vector.dtype for vector in vectors} == {np.dtype(np.float32)}
    starts = [vector.ctypes.data for vector in vectors]
    assert [start % PAGE for start in starts] == [0] * 6
    assert [start - starts[0] for start in starts] == [2 * PAGE * number for number in range(6)]
    segment.close()


def test_what_one_mapping_writes_the_other_reads() -> None:
    mine = Segment(10, 2)
    assert mine.file is not None
    other = Segment(10, 2, os.dup(mine.file))
    mine.slots[0].weights[:] = 1
    mine.slots[1].gradient[:] = 2
    other.slots[0].gradient[:] = 3
    assert [[float(vector[9]) for vector in slot] for slot in other.slots] == [[1, 3], [0, 2]]
    assert float(mine.slots[0].gradient[0]) == 3
    mine.close()


@pytest.mark.parametrize("length", [0, PAGE, 5 * PAGE])
def test_the_kernel_refuses_to_change_a_segments_size(length: int) -> None:
    segment = Segment(1000, 2)
    assert segment.file is not None
    assert os.fstat(segment.file).st_size == 4 * PAGE
    with pytest.raises(PermissionError):
        os.ftruncate(segment.file, length)
    segment.close()


def test_memory_outlives_its_descriptor() -> None:
    segment = Segment(10, 1)
    assert segment.file is not None
    file = segment.file
    received = os.dup(segment.file)
    other = Segment(10, 1, received)
    assert other.file is None
    assert not is_open(received)
    segment.close()
    assert not is_open(file)
    segment.close()  # a second call must not close the file that has got this number
    segment.slots[0].weights[:] = 7
    slots = other.slots
    del other, segment
    assert slots[0].weights.tolist() == [7.0] * 10


def unsealed(size: int) -> int:
    file = os.memfd_create("psgd-test", os.MFD_ALLOW_SEALING)
    os.ftruncate(file, size)
    return file


def sealed(size: int, seals: int = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW) -> int:
    file = unsealed(size)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
    return file


def pipe(size: int) -> int:
    reading, writing = os.pipe()
    os.close(writing)
    return reading


def on_disk(size: int) -> int:
    file = os.open("/tmp", os.O_TMPFILE | os.O_RDWR)  # noqa: S108
    os.ftruncate(file, size)
    return file


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (unsealed, r"seals 0x0 was passed; expected 8192 bytes, sealed in size"),
        (lambda size: sealed(size, fcntl.F_SEAL_GROW), "seals 0x4"),
        (lambda size: sealed(size - PAGE), "shared memory of 4096 bytes with"),
        (lambda size: sealed(size + PAGE), "shared memory of 12288 bytes with"),
        (lambda size: sealed(size, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE), "cannot be mapped"),
        (pipe, "is no shared memory"),
        (on_disk, "is no shared memory"),
    ],
)
def test_a_descriptor_that_is_no_such_segment_is_refused_and_closed(make: Callable[[int], int], message: str) -> None:
    file = make(2 * PAGE)
    with pytest.raises(SharedMemoryError, match=message):
        Segment(10, 1, file)
    assert not is_open(file)


def test_a_vector_of_another_length_is_refused_and_closed() -> None:
    vector = PublishedVector(10)
    file = os.dup(vector.file)
    with pytest.raises(SharedMemoryError, match=r"shared memory of 104 bytes with.*expected 108 bytes"):
        PublishedVector(11, file)
    assert not is_open(file)
    vector.close()


def too_little(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(memory, "free_memory", lambda: 2**20)


def another_system(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(memory, "has_shared_memory", lambda: False)


def too_many_files(patch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, flags: int) -> int:
        raise OSError(24, "Too many open files")

    patch.setattr(os, "memfd_create", refuse)


def no_room(patch: pytest.MonkeyPatch) -> None:
    def refuse(file: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    patch.setattr(os, "ftruncate", refuse)


@pytest.mark.parametrize(
    ("break_it", "fault"),
    [
        (too_little, r"[1-9][\d.]+ MiB of shared memory are needed, but only 1\.0 MiB are free"),
        (another_system, "this system has no anonymous shared memory"),
        (too_many_files, "no memory can be shared: .*Too many open files"),
        (no_room, "no memory can be shared: .*No space left"),
    ],
)
def test_where_no_memory_can_be_shared_a_segment_is_private_and_says_why(
    monkeypatch: pytest.MonkeyPatch, break_it: Callable[[pytest.MonkeyPatch], None], fault: str
) -> None:
    before = open_files()
    with monkeypatch.context() as patch:
        break_it(patch)
        segment = Segment(500_000, 2)
        with pytest.raises(SharedMemoryError, match=fault):
            PublishedVector(500_000)
    assert segment.file is None
    assert re.match(fault, segment.fault)
    segment.slots[1].gradient[:] = 5
    assert float(segment.slots[1].gradient.sum()) == 2_500_000
    assert float(np.abs([segment.slots[0], (segment.slots[1].weights,) * 2]).max()) == 0
    assert open_files() <= before


# Published vector


def test_a_reader_sees_the_owners_values_and_version() -> None:
    owner = PublishedVector(5)
    reader = PublishedVector(5, os.dup(owner.file))
    into = np.empty(5, np.float32)
    for updates in range(3):
        owner.begin()
        owner.values[:] = updates
        owner.end(Version(3, updates))
        assert reader.version == owner.version == Version(3, updates)
        assert reader.snapshot(into) == Version(3, updates)
        assert into.tolist() == [updates] * 5
    owner.close()
    assert reader.snapshot(into) == Version(3, 2)


def test_nobody_but_the_owner_can_write() -> None:
    owner = PublishedVector(5)
    reader = PublishedVector(5, os.dup(owner.file))
    length = os.fstat(owner.file).st_size
    reopened = os.open(f"/proc/self/fd/{owner.file}", os.O_RDWR)
    for file in (owner.file, reopened):
        with pytest.raises(PermissionError):
            mmap.mmap(file, length, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(PermissionError):
            os.pwrite(file, b"x", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(file, length - 1)
    with pytest.raises(ValueError, match="read-only"):
        reader.values[0] = 1
    owner.values[:] = 4
    assert reader.values.tolist() == [4.0] * 5
    os.close(reopened)
    owner.close()


def test_a_reader_gives_up_after_three_tries_while_a_change_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    vector = PublishedVector(5)
    tries: list[None] = []
    monkeypatch.setattr(os, "sched_yield", lambda: tries.append(None))
    vector.begin()
    assert vector.snapshot(np.empty(5, np.float32)) is None
    assert len(tries) == 3
    vector.end(Version(1, 1))
    assert vector.snapshot(np.empty(5, np.float32)) == Version(1, 1)
    vector.close()


@pytest.mark.parametrize(("changes", "version"), [(1, Version(1, 1)), (2, Version(1, 2)), (3, None), (9, None)])
def test_a_copy_during_which_the_values_changed_is_made_again_twice(
    monkeypatch: pytest.MonkeyPatch, changes: int, version: Version | None
) -> None:
    vector = PublishedVector(5)
    copies = 0
    copy = np.copyto

    def disturbed(into: FloatArray, values: FloatArray) -> None:
        nonlocal copies
        copy(into, values)
        if copies < changes:
            vector.begin()
            vector.values[:] = copies + 1
            vector.end(Version(1, copies + 1))
        copies += 1

    monkeypatch.setattr(np, "copyto", disturbed)
    into = np.empty(5, np.float32)
    assert vector.snapshot(into) == version
    assert copies == min(changes + 1, 3)
    if version:
        assert into.tolist() == [version.updates] * 5
    vector.close()


@pytest.mark.skipif(not memory.stores_are_ordered(), reason="on such processors readers ask the server for a copy")
def test_a_snapshot_beside_a_writer_that_never_stops_is_of_one_version() -> None:
    mine, its = socket.socketpair()
    mine.settimeout(LIMIT_S)
    with mine, process(WRITER, its, SIZE):
        _, (file,), _, _ = socket.recv_fds(mine, 1, 1)
        vector = PublishedVector(SIZE, file)
        into = np.empty(SIZE, np.float32)
        taken: set[int] = set()
        newest = 0
        end = time.monotonic() + LIMIT_S
        while len(taken) < SNAPSHOTS and time.monotonic() < end:
            version = vector.snapshot(into)
            if version is not None:
                assert version.incarnation == 1
                assert version.updates >= newest
                assert (into == version.updates).all()
                taken.add(newest := version.updates)
    assert len(taken) == SNAPSHOTS


# Afterwards


def test_nothing_is_left_of_memory_whose_processes_were_killed() -> None:
    its_channel, channel = socket.socketpair()
    with process(OWNER, its_channel) as owner, process(READER, channel) as reader:
        inodes = {int(inode) for inode in line(owner).split()}
        assert line(reader) == "mapped\n"
        assert len(inodes) == 2
        assert users(inodes) == {owner.pid, reader.pid}
        for killed in (reader, owner):
            killed.send_signal(signal.SIGKILL)
            assert killed.wait(LIMIT_S) == -signal.SIGKILL
    assert users(inodes) == set()
    assert not [path for path in Path("/dev/shm").iterdir() if "psgd" in path.name]  # noqa: S108


def users(inodes: set[int]) -> set[int]:
    """Return the processes that have one of these memfd files open or mapped."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # the process has ended, or belongs to another user
            mapped = [
                fields[4]
                for fields in map(str.split, (folder / "maps").read_text().splitlines())
                if len(fields) > 5 and fields[5].startswith("/memfd:psgd-")
            ]
            opened = [
                file.stat().st_ino
                for file in (folder / "fd").iterdir()
                if str(file.readlink()).startswith("/memfd:psgd-")
            ]
            if inodes & {*map(int, mapped), *opened}:
                found.add(int(folder.name))
    return found


def test_a_kernel_that_cannot_forbid_writing_shares_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    add_seals = fcntl.fcntl

    def fails(file: int, command: int, argument: int = 0) -> int:
        if argument == memory.F_SEAL_FUTURE_WRITE:
            raise OSError(errno.EINVAL, "Invalid argument")  # as Linux before 5.1
        return add_seals(file, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", fails)
    files = open_files()
    with pytest.raises(SharedMemoryError, match=r"since version 5\.1: .*Invalid argument"):
        PublishedVector(4)
    assert open_files() == files
