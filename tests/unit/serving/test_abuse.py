from __future__ import annotations

import gc
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import nan
from threading import Thread
from typing import Any
from zlib import crc32

import numpy as np
import pytest

from psgd.serving import handshakes, limited_log
from psgd.serving import listener as listener_module
from psgd_workers.errors import ServerGoneError, SharedMemoryError
from psgd_workers.messages import Outcome, Version
from psgd_workers.transport import memory
from psgd_workers.transport.frames import HEADER_SIZE, Frame, FrameKind
from psgd_workers.transport.handshake import GREETING_SIZE, HELLO_SIZE, WELCOME_SIZE
from tests.support.jobs import push_header
from tests.support.server_harness import (
    BIG,
    FIRST,
    INT8,
    LANE_CASES,
    LIMIT_S,
    PULL,
    V1,
    Harnesses,
    LaneCase,
    batch,
    closed,
    exactly,
    header,
    works,
)
from tests.support.tagged_socket import TaggedSocket

if not memory.has_shared_memory():
    pytest.skip("needs Linux' anonymous shared memory", allow_module_level=True)


QUESTION = PULL._replace(kind=FrameKind.ASK, slot=1, wants=False)
NUM_STREAMS = 50  # connections at the same time


def mutated(rng: np.random.Generator, frame: Frame, number: int) -> bytes:
    """Return a damaged header; the checksum is right if `number` is odd."""
    data = bytearray(frame.pack())
    for _ in range(rng.integers(1, 4)):
        place = int(rng.integers(HEADER_SIZE))
        data[place] = int(rng.integers(256)) if rng.random() < 0.5 else data[place] ^ 1 << int(rng.integers(8))
    if number % 2:
        data[HEADER_SIZE - 4 :] = struct.pack("<I", crc32(data[: HEADER_SIZE - 4]))
    return bytes(data)


@pytest.mark.parametrize("kind", LANE_CASES)
def test_damaged_frames_change_nothing_and_stop_nobody(harnesses: Harnesses, kind: LaneCase) -> None:
    """The undamaged push is refused: it is not finite and of another version. So no damage can get it applied."""
    harness = harnesses()
    push = header(harness, payload=harness.push_format.sizes("tcp" not in kind)[-1], norm=nan, version=Version(99, 9))
    rng = np.random.default_rng(0)
    streams = harness.all_shaken(kind, NUM_STREAMS)
    dropped = 0
    for turn in range(1000 // NUM_STREAMS):
        for number, stream in enumerate(streams):
            frame = (push, PULL, PULL._replace(kind=FrameKind.ASK, wants=False))[(turn + number) % 3]
            with suppress(ConnectionResetError, BrokenPipeError):
                stream.sendall(mutated(rng, frame, number) + bytes(frame.payload))
                stream.sendall(QUESTION.pack())
        streams = [stream for stream in streams if is_answered(stream)]
        dropped += NUM_STREAMS - len(streams)
        streams += harness.all_shaken(kind, NUM_STREAMS - len(streams))
    assert dropped > 400
    harness.log.wait("the connection of by-hand was closed", times=dropped)
    assert harness.untouched()
    works(harness, kind=kind)


def is_answered(stream: socket.socket) -> bool:
    """Return True if a connection still answers with the version, after the answers to earlier requests."""
    with suppress(ConnectionResetError, BrokenPipeError):
        while answer := exactly(stream, HEADER_SIZE):
            frame = Frame.unpack(answer)
            if frame.payload:
                exactly(stream, frame.payload)
            if (frame.kind, frame.slot) == (FrameKind.VERSION, 1):
                return True
    stream.close()
    return False


# Workers that die, are slow, or are too many


KILLED = """
import socket, sys
stream = socket.socket(fileno=int(sys.argv[1]))
stream.sendall(bytes.fromhex(sys.argv[2]))
print("sent", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("kind", "sections"),
    [(kind, sections) for kind in LANE_CASES for sections in ({}, INT8) if "tcp" in kind or sections],
)
def test_a_worker_that_is_killed_in_the_middle_of_a_push_has_pushed_nothing(
    harnesses: Harnesses, kind: LaneCase, sections: Any
) -> None:
    harness = harnesses(sections=sections)
    stream = harness.shaken(kind)
    push = header(harness, code=4 if sections else 0, payload=harness.push_format.sizes("tcp" not in kind)[-1])
    half = push.pack() + bytes(push.payload // 2)
    command = [sys.executable, "-c", KILLED, str(stream.fileno()), half.hex()]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, pass_fds=[stream.fileno()], **pipes) as worker:
        assert worker.stdout is not None
        stream.close()  # now only the other process has the socket
        assert select.select([worker.stdout], [], [], 2 * LIMIT_S)[0]
        assert len(harness.streams()) == 1
        worker.send_signal(signal.SIGKILL)
        assert worker.wait(LIMIT_S) == -signal.SIGKILL
    harness.log.wait("the connection of by-hand was closed: the other end closed it in the middle of a frame")
    harness.listener.wait_until_all_left()
    assert harness.streams() == []
    assert harness.untouched()
    works(harness, kind=kind)


@pytest.mark.parametrize("kind", LANE_CASES)
def test_workers_that_stop_in_the_middle_of_a_frame_slow_down_no_other(harnesses: Harnesses, kind: LaneCase) -> None:
    harness = harnesses()
    streams = harness.all_shaken(kind, 8)
    push = header(harness, payload=harness.push_format.sizes("tcp" not in kind)[0]).pack()
    for number, stream in enumerate(streams):
        stream.sendall(push[: 1 + 10 * number])
    worker = harness.lane(kind)
    harness.join("worker-0")
    for position in range(50):
        receipt = worker.lane.push(worker.gradient(0, batch(position), V1), 0, wants=True).receipt(LIMIT_S)
        assert receipt.outcome is Outcome.APPLIED
    assert harness.log.count("was closed") == 0


@pytest.mark.parametrize("kind", LANE_CASES)
@pytest.mark.parametrize("sections", [{}, INT8])
def test_a_frame_may_arrive_in_pieces(harnesses: Harnesses, sections: Any, kind: LaneCase) -> None:
    harness = harnesses(sections=sections)
    stream = harness.shaken(kind)
    worker = harness.lane(kind)
    gradient = worker.gradient(0, FIRST, V1)
    payload = b"".join(harness.push_format.payload(gradient, shared="tcp" not in kind))
    frame = push_header(gradient, 0, False, 1, len(payload)) + payload
    for byte in stream.tagged(frame) if isinstance(stream, TaggedSocket) else frame:
        stream.sendall(bytes([byte]))
    answer = Frame.unpack(exactly(stream, HEADER_SIZE))
    assert (answer.kind, answer.version) == (FrameKind.RECEIPT, Version(1, 1))


@pytest.mark.parametrize("kind", LANE_CASES)
def test_who_pushes_to_a_server_that_fails_does_not_wait(
    monkeypatch: pytest.MonkeyPatch, harnesses: Harnesses, kind: LaneCase
) -> None:
    harness = harnesses()
    clients = [harness.lane(kind, worker) for worker in ("worker-0", "worker-1")]

    def breaks(*arguments: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(harness.server._optimizer, "step", breaks)
    for position, client in enumerate(clients):
        with pytest.raises(ServerGoneError, match="the server is gone"):
            client.lane.push(client.gradient(0, batch(position), V1), 0, wants=False).receipt(LIMIT_S)
        harness.log.wait(f"the connection of {client.worker} was closed because of a fault in the server")


def test_a_worker_that_does_not_read_its_weights_keeps_nobody_waiting(harnesses: Harnesses) -> None:
    harness = harnesses(**BIG)
    slow = harness.shaken("tcp")
    slow.sendall(PULL.pack())
    works(harness, 0, "tcp")
    works(harness, 1, "shm")
    answer = Frame.unpack(exactly(slow, HEADER_SIZE))
    assert (answer.kind, answer.version, answer.payload) == (FrameKind.WEIGHTS, V1, 4 * harness.size)
    assert exactly(slow, answer.payload) == harness.weights.tobytes(), "the weights are those of the request's time"


def test_a_worker_that_asks_and_never_reads_is_dropped(harnesses: Harnesses) -> None:
    harness = harnesses(**BIG)
    never_reads = harness.shaken("tcp")
    other = harness.lane("tcp")
    with suppress(ConnectionResetError, BrokenPipeError):
        for _ in range(100):
            never_reads.sendall(PULL.pack())
    harness.log.wait("by-hand was closed: the worker sends requests but does not read the answers")
    assert other.lane.pull(0, LIMIT_S) == V1


def test_a_worker_that_reads_late_but_all_may_have_all_its_slots_answered(harnesses: Harnesses) -> None:
    harness = harnesses(**BIG)
    late = harness.shaken("tcp")
    for slot in (0, 1):
        late.sendall(PULL._replace(slot=slot).pack())
    late.sendall(QUESTION.pack())
    assert is_answered(late)


def test_silent_connections_from_the_network_do_not_keep_workers_of_this_machine_out(
    monkeypatch: pytest.MonkeyPatch, harnesses: Harnesses
) -> None:
    monkeypatch.setattr(handshakes, "MAX_HANDSHAKES", 3)
    monkeypatch.setattr(listener_module, "HANDSHAKE_S", 10 * LIMIT_S)
    harness = harnesses()
    before = harness.connected("shm")  # silent, too; connections from the network do not take its place
    silent = [harness.connected("tcp") for _ in range(8)]
    assert all(map(closed, silent[:5]))
    for stream in silent[5:]:
        exactly(stream, GREETING_SIZE)
    works(harness, 0, "shm")
    works(harness, 1, "tcp")
    assert closed(silent[5]), "it made room for the worker"
    harness.greet(before, "shm")
    harness.finish(before, "shm")
    assert before.recv(1) == b"\0"


@pytest.mark.parametrize("kind", LANE_CASES)
def test_workers_get_in_at_once_beside_500_silent_connections(
    monkeypatch: pytest.MonkeyPatch, harnesses: Harnesses, kind: LaneCase
) -> None:
    monkeypatch.setattr(listener_module, "HANDSHAKE_S", 10 * LIMIT_S)  # none of them is closed for its silence
    harness = harnesses()
    silent = [harness.connected(kind) for _ in range(500)]
    works(harness, 0, kind)
    assert all(map(closed, silent[: 500 - handshakes.MAX_HANDSHAKES]))


def test_a_storm_of_connections_does_not_fill_the_log(monkeypatch: pytest.MonkeyPatch, harnesses: Harnesses) -> None:
    harness = harnesses()
    monkeypatch.setattr(limited_log, "MAX_LINES", 5)
    for _ in range(40):
        with harness.connected("tcp") as stream:
            stream.sendall(bytes(HELLO_SIZE))
            assert closed(stream)
    harness.listener.close()
    assert harness.log.count("does not have this run's key") == 5
    assert harness.log.lines[-1] == "35 more lines about connections were left out"
    assert len(harness.log.lines) == 6


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can connect as another user")
def test_another_user_of_the_machine_is_refused(harnesses: Harnesses) -> None:
    harness = harnesses()
    stream = harness.unconnected("shm")
    process = os.fork()
    if process == 0:  # the kernel notes the user at the moment of the connection
        os.setuid(65534)
        harness.connect(stream)
        os._exit(0)
    assert os.waitpid(process, 0)[1] == 0
    assert closed(stream)
    harness.log.wait("a new connection was refused: process .* is of user 65534, and this server is of user 0")
    works(harness, 0, "shm")


@contextmanager
def no_more_files() -> Iterator[None]:
    """Take all file descriptors that this process may open."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    gc.collect()  # so that no file of an earlier test is closed meanwhile
    gc.disable()
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, limits[1]))  # noqa: PTH208
    try:
        with suppress(OSError):
            while True:
                taken.append(os.dup(0))
        yield
    finally:
        for file in taken:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        gc.enable()


@pytest.mark.parametrize("kind", LANE_CASES)
def test_a_server_without_descriptors_goes_on_and_takes_workers_when_it_has_some(
    monkeypatch: pytest.MonkeyPatch, harnesses: Harnesses, kind: LaneCase
) -> None:
    monkeypatch.setattr(listener_module, "RETRY_S", 0.05)
    harness = harnesses()
    client = harness.lane(kind)
    waiting = harness.unconnected(kind)
    with no_more_files():
        harness.connect(waiting)
        harness.log.wait("cannot accept a worker: .*Too many open files", times=2)
        read = client.lane.pull(0, LIMIT_S)
        receipt = client.lane.push(client.gradient(0, FIRST, read), 0, wants=True).receipt(LIMIT_S)
        assert receipt.outcome is Outcome.APPLIED
        with pytest.raises(ServerGoneError, match=r"cannot reach the server at .*Too many open files"):
            harness.lane("tcp")
        with pytest.raises(SharedMemoryError, match=r"no memory can be shared: .*Too many open files"):
            harness.lane("shm")
    assert len(exactly(waiting, GREETING_SIZE)) == GREETING_SIZE


@pytest.mark.parametrize("kind", LANE_CASES)
def test_a_server_without_threads_takes_workers_when_it_has_some(
    monkeypatch: pytest.MonkeyPatch, harnesses: Harnesses, kind: LaneCase
) -> None:
    monkeypatch.setattr(listener_module, "RETRY_S", 0.05)
    harness = harnesses()
    starts = Thread.start

    def fails_twice(thread: Thread) -> None:
        if thread.name == "psgd-connection" and harness.log.count("cannot accept a worker: can't start new thread") < 2:
            raise RuntimeError("can't start new thread")
        starts(thread)

    monkeypatch.setattr(Thread, "start", fails_twice)
    refused = [harness.connected(kind) for _ in range(2)]
    works(harness, kind=kind)
    assert all(map(closed, refused))


def test_a_server_that_cannot_take_a_workers_memory_drops_it(harnesses: Harnesses) -> None:
    harness = harnesses()
    stream = harness.greeted("shm")
    _, (file,), _, _ = socket.recv_fds(stream, WELCOME_SIZE, 1)
    with no_more_files():
        socket.send_fds(stream, [b"\0"], [file])
        assert closed(stream)
    harness.log.wait("has 1 bytes and 0 descriptors, expected 1 and 1")
    os.close(file)
    works(harness)


def test_a_worker_in_the_network_that_vanishes_is_found_out(harnesses: Harnesses) -> None:
    harness = harnesses()
    harness.lane("tcp")
    (served,) = harness.streams()
    assert served.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    silence = served.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
    assert 10 <= silence <= 120
