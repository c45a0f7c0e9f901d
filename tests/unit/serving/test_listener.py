from __future__ import annotations

import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from math import inf, nan
from typing import Any
from zlib import crc32

import numpy as np
import pytest

from psgd.serving import listener as listener_module
from psgd_workers.errors import ListenError, ServerGoneError
from psgd_workers.messages import BatchId, Outcome, Version
from psgd_workers.transport import memory
from psgd_workers.transport.frames import HEADER_SIZE, Frame, FrameKind
from psgd_workers.transport.handshake import GREETING_SIZE, HELLO_SIZE, WELCOME_SIZE, Greeting
from tests.support.server_harness import (
    FIRST,
    LANE_CASES,
    LIMIT_S,
    PART,
    PULL,
    V1,
    Harnesses,
    LaneCase,
    ServerHarness,
    batch,
    closed,
    exactly,
    header,
    open_files,
    works,
)

if not memory.has_shared_memory():
    pytest.skip("needs Linux' anonymous shared memory", allow_module_level=True)


# Handshakes


@pytest.mark.parametrize("kind", LANE_CASES)
def test_a_worker_without_the_key_is_dropped(harnesses: Harnesses, kind: LaneCase) -> None:
    harness = harnesses()
    with pytest.raises(ServerGoneError, match="closed the connection; the server's log says why"):
        harness.lane(kind, address=harness.address._replace(key=bytes(32)))
    harness.log.wait("closed in its handshake: the worker does not have this run's key")
    works(harness, kind=kind)


@pytest.mark.parametrize("kind", LANE_CASES)
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"incarnation": 2}, "has .incarnation, values, shared. = .2, 90, .*, expected .1, 90"),
        ({"num_parameters": 91}, "1, 91"),
        ({"num_parameters": 2**60}, f"1, {2**60}"),
        ({"slots": 0}, "slots is 0"),
        ({"slots": 9}, "slots is 9, expected 1 to 8"),
    ],
)
def test_a_worker_of_another_job_or_server_is_dropped(
    harnesses: Harnesses, kind: LaneCase, changes: dict[str, int], reason: str
) -> None:
    harness = harnesses()
    assert closed(harness.greeted(kind, **changes))
    harness.log.wait(f"closed in its handshake: by-hand .*{reason}")
    works(harness, kind=kind)


@pytest.mark.parametrize("kind", LANE_CASES)
def test_who_shares_memory_comes_by_the_unix_socket_and_nobody_else(harnesses: Harnesses, kind: LaneCase) -> None:
    harness = harnesses()
    assert closed(harness.greeted(kind, shared="tcp" in kind))
    harness.log.wait("closed in its handshake: by-hand has .incarnation")


@pytest.mark.parametrize("kind", LANE_CASES)
def test_a_hello_that_was_overheard_opens_nothing(harnesses: Harnesses, kind: LaneCase) -> None:
    harness = harnesses()
    greeting = Greeting.unpack(exactly(harness.connected(kind), GREETING_SIZE))
    overheard = harness.hello(kind).pack(harness.listener.key, greeting)
    thief = harness.connected(kind)
    thief.sendall(overheard)
    assert closed(thief)
    harness.log.wait("the worker does not have this run's key")


def test_a_name_that_is_no_text_is_dropped(harnesses: Harnesses, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = harnesses()
    stream = harness.connected("tcp")
    greeting = Greeting.unpack(exactly(stream, GREETING_SIZE))

    class Bytes(str):
        __slots__ = ()

        def encode(self, *arguments: Any) -> bytes:
            return b"\xff\xfe"

    stream.sendall(harness.hello("tcp", worker=Bytes()).pack(harness.listener.key, greeting))
    assert closed(stream)
    harness.log.wait("closed in its handshake: 'utf-8' codec")


@pytest.mark.parametrize("kind", LANE_CASES)
@pytest.mark.parametrize("bytes_sent", [0, 1, HELLO_SIZE - 1])
def test_who_falls_silent_in_the_handshake_is_dropped(
    monkeypatch: pytest.MonkeyPatch, harnesses: Harnesses, kind: LaneCase, bytes_sent: int
) -> None:
    monkeypatch.setattr(listener_module, "HANDSHAKE_S", 0.1)
    harness = harnesses()
    stream = harness.connected(kind)
    stream.sendall(bytes(bytes_sent))
    assert closed(stream)
    harness.log.wait("a new connection was closed: its handshake was not finished within 0.1 s")


def test_who_does_not_pass_its_memory_is_dropped(monkeypatch: pytest.MonkeyPatch, harnesses: Harnesses) -> None:
    monkeypatch.setattr(listener_module, "HANDSHAKE_S", 0.1)
    harness = harnesses()
    assert closed(harness.greeted("shm"))
    harness.log.wait("handshake was not finished within 0.1 s")


def no_file(harness: ServerHarness) -> list[int]:
    return []


def a_pipe(harness: ServerHarness) -> list[int]:
    reading, writing = os.pipe()
    os.close(writing)
    return [reading]


def memory_of(slots: int, more: int = 0, seals: int = fcntl.F_SEAL_SHRINK) -> Callable[[ServerHarness], list[int]]:
    def made(harness: ServerHarness) -> list[int]:
        file = os.memfd_create("psgd-test", os.MFD_ALLOW_SEALING)
        os.ftruncate(file, 2 * 4096 * slots + more)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
        return [file]

    return made


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (no_file, "has 1 bytes and 0 descriptors, expected 1 and 1"),
        (a_pipe, "is no shared memory"),
        (memory_of(3), "shared memory of 24576 bytes with.*; expected 16384"),
        (memory_of(2, more=-1), "shared memory of 16383 bytes with"),
        (memory_of(2, seals=0), "seals 0x0 was passed; expected 16384 bytes, sealed in size"),
        (memory_of(2, seals=fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE), "cannot be mapped"),
    ],
)
def test_memory_that_is_none_is_refused(
    harnesses: Harnesses, files: Callable[[ServerHarness], list[int]], reason: str
) -> None:
    harness = harnesses()
    works(harness)
    before = open_files()
    stream = harness.greeted("shm")
    _, (its,), _, _ = socket.recv_fds(stream, WELCOME_SIZE, 1)
    passed = files(harness)
    socket.send_fds(stream, [b"\0"], passed)
    assert closed(stream)
    harness.log.wait(f"closed in its handshake: .*{reason}")
    stream.close()
    for file in (its, *passed):
        os.close(file)
    assert open_files() <= before
    works(harness, 1)


# Frames that no worker sends


def broken(frame: Frame, place: int, value: int) -> bytes:
    """Return the header with another byte, and with the right checksum."""
    fields = bytearray(frame.pack()[: HEADER_SIZE - 4])
    fields[place] = value
    return bytes(fields) + struct.pack("<I", crc32(fields))


BAD_FRAMES: dict[str, tuple[Callable[[ServerHarness, Frame], bytes], str]] = {
    "garbage": (lambda harness, push: b"GET / HTTP/1.1\r\n".ljust(HEADER_SIZE), "begins with b'GET '"),
    "checksum": (lambda harness, push: push.pack()[:-1] + b"\0", "checksum of a frame's header is wrong"),
    "format": (lambda harness, push: broken(push, 4, 2), "format 2"),
    "unknown kind": (lambda harness, push: broken(push, 5, 9), "has kind 9"),
    "receipt": (
        lambda harness, push: push._replace(kind=FrameKind.RECEIPT).pack(),
        "no worker sends a frame RECEIPT with",
    ),
    "weights": (lambda harness, push: push._replace(kind=FrameKind.WEIGHTS).pack(), "WEIGHTS with"),
    "full pull": (lambda harness, push: PULL._replace(payload=4).pack() + bytes(4), "PULL with 4 bytes of payload"),
    "full ask": (lambda harness, push: PULL._replace(kind=FrameKind.ASK, payload=2**63).pack(), "ASK with"),
    "incarnation": (lambda harness, push: push._replace(incarnation=2).pack(), "2, and this server is 1"),
    "slot": (lambda harness, push: push._replace(slot=2).pack(), "from slot 2, which does not exist"),
    "slot of ask": (lambda harness, push: PULL._replace(kind=FrameKind.ASK, slot=255).pack(), "from slot 255"),
    "code": (lambda harness, push: push._replace(code=3).pack(), "values of code 3, expected 0"),
    "oversized": (lambda harness, push: push._replace(payload=2**64 - 1).pack(), f"{2**64 - 1} bytes of payload"),
    "one too many": (
        lambda harness, push: push._replace(payload=push.payload + 1).pack(),
        "bytes of payload, expected",
    ),
    "epoch": (lambda harness, push: push._replace(batch=BatchId(2, 0, 0)).pack(), "an epoch from 0 to 1"),
    "shard": (lambda harness, push: push._replace(batch=BatchId(0, 2, 0)).pack(), "a shard below 2"),
    "index": (lambda harness, push: push._replace(batch=BatchId(0, 1, 40)).pack(), "an index below"),
    "last index": (lambda harness, push: push._replace(batch=BatchId(0, 0, 2**32 - 1)).pack(), "an index below"),
    "no examples": (lambda harness, push: push._replace(examples=0).pack(), "with 0 examples; it has 10"),
    "examples": (lambda harness, push: push._replace(examples=11).pack(), "with 11 examples; it has 10"),
    "no number": (lambda harness, push: push._replace(number=0).pack(), "number 0 of slot 0"),
    "what it carries": (
        lambda harness, push: push._replace(carries=1).pack(),
        "number 1 of slot 0 and carries on 1",
    ),
    "norm": (lambda harness, push: push._replace(norm=-1e-6).pack(), "norm -1e-06"),
    "time": (lambda harness, push: push._replace(compute_s=-1.0).pack(), r"computing time -1\.0 s"),
    "long time": (lambda harness, push: push._replace(compute_s=1e300).pack(), r"computing time 1e\+300 s"),
    "endless time": (lambda harness, push: push._replace(compute_s=inf).pack(), "computing time inf s"),
    "no time": (lambda harness, push: push._replace(compute_s=nan).pack(), "computing time nan s"),
}


@pytest.mark.parametrize("kind", LANE_CASES)
@pytest.mark.parametrize("name", BAD_FRAMES)
def test_what_no_worker_sends_ends_its_connection_and_changes_nothing(
    harnesses: Harnesses, kind: LaneCase, name: str
) -> None:
    harness = harnesses()
    other = harness.lane(kind)
    stream = harness.shaken(kind)
    (make, reason) = BAD_FRAMES[name]
    push = header(harness, payload=harness.push_format.sizes("tcp" not in kind)[-1])
    with suppress(ConnectionResetError, BrokenPipeError):  # the server may have closed it after the header
        stream.sendall(make(harness, push) + bytes(push.payload))
    assert closed(stream)
    harness.log.wait(f"the connection of by-hand was closed: .*{reason}")
    assert harness.untouched()
    assert harness.report().bytes_pushed == 0
    receipt = other.lane.push(other.gradient(0, FIRST, V1), 0, wants=True).receipt(LIMIT_S)
    assert receipt.outcome is Outcome.APPLIED


@pytest.mark.parametrize("kind", LANE_CASES)
@pytest.mark.parametrize("again", [FrameKind.PUSH, FrameKind.PULL])
def test_a_slot_whose_receipt_is_not_given_takes_nothing(
    harnesses: Harnesses, kind: LaneCase, again: FrameKind
) -> None:
    harness = harnesses("bsp", 2)
    harness.join("by-hand", "worker-0")
    stream = harness.shaken(kind)
    push = header(harness, payload=harness.push_format.sizes("tcp" not in kind)[-1])
    stream.sendall(push.pack() + np.ones(harness.size, np.float32).tobytes()[: push.payload])
    harness.arrived()
    size = push.payload if again is FrameKind.PUSH else 0
    stream.sendall(push._replace(kind=again, batch=batch(1), payload=size).pack())
    assert closed(stream)
    harness.log.wait("from slot 0, which does not exist or still waits for a receipt")
    assert harness.untouched() is False, "the earlier push is kept"
    assert harness.settled() == 1
    other = harness.lane(kind)
    receipt = other.lane.push(other.gradient(0, batch(2), V1), 0, wants=True).receipt(LIMIT_S)
    assert (receipt.outcome, receipt.version) == (Outcome.APPLIED, Version(1, 1))


@pytest.mark.parametrize("kind", LANE_CASES)
@pytest.mark.parametrize(
    ("lengths", "arrays", "reason"),
    [
        ((3, 4), [1, 2, 3, 0, 0, 0, 0, 0], "3 indices for 4 values"),
        ((2, 2), [2, 1, 0, 0], "not strictly ascending"),
        ((2, 2), [1, 1, 0, 0], "not strictly ascending"),
        ((2, 2), [1, 60, 0, 0], "index 60, expected one below 60"),
        ((61, 1), [0] * 4, "61 values of 60"),
        ((2**64 - 1, 1), [0] * 4, f"{2**64 - 1} values of 60"),
        ((2, 10), [1, 2, 0, 0], "10 values of 60 in 36 bytes"),
        ((2, 8), [1, 2, 0, 0], "a push is 24 bytes too short"),
        ((0, 0), [0] * 4, "has 16 bytes after its vectors, expected 0"),
    ],
)
def test_an_encoded_push_that_lies_about_its_arrays_ends_its_connection(
    harnesses: Harnesses, kind: LaneCase, lengths: tuple[int, int], arrays: list[int], reason: str
) -> None:
    harness = harnesses(sections={"compression": {"name": "top_k", "ratio": 0.2}})
    stream = harness.shaken(kind)
    payload = struct.pack(f"<QQ{len(arrays)}I", *lengths, *arrays) + bytes(4 * (harness.size - PART.num_trainable))
    stream.sendall(header(harness, code=2, payload=len(payload)).pack() + payload)
    assert closed(stream)
    harness.log.wait(f"the connection of by-hand was closed: .*{reason}")
    assert harness.untouched()
    works(harness, kind=kind)


# Listening and ending


def test_no_free_port_is_an_error_that_says_what_to_do(harnesses: Harnesses) -> None:
    harness = harnesses()
    taken = harness.address.port
    assert taken is not None
    with pytest.raises(ListenError, match=f"no port from {taken} to {taken} is free on 127.0.0.1: widen scaling.ports"):
        harness.listen(unix=False, ports=(taken, taken))


def test_the_first_free_port_of_a_range_is_taken(harnesses: Harnesses) -> None:
    harness = harnesses(tcp=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        first = taken.getsockname()[1]
        listener = harness.listen(unix=False, ports=(first, first + 50))
    assert listener.port is not None
    assert first < listener.port <= first + 50
    listener.close()


def test_a_server_cannot_listen_on_another_machines_address(harnesses: Harnesses) -> None:
    harness = harnesses(tcp=False)
    with pytest.raises(ListenError, match=r"cannot listen on 192\.0\.2\.1:0"):
        harness.listener.listen_tcp("192.0.2.1", None)


def test_a_restarted_server_gets_its_port_back(harnesses: Harnesses) -> None:
    """The earlier server closes its connections first, so that the kernel keeps them for a minute."""
    harness = harnesses()
    client = harness.lane("tcp")
    port = harness.address.port
    assert port is not None
    client.lane.pull(0, LIMIT_S)
    harness.listener.close()
    with pytest.raises(ServerGoneError, match="the server is gone"):
        client.lane.pull(0, LIMIT_S)
    client.lane.close()
    harness.listener = harness.listen(ports=(port, port))
    harness.address = harness.listener.address("node", "127.0.0.1")
    assert harness.address.port == port
    works(harness, kind="tcp")


def test_a_closed_listener_leaves_nothing(harnesses: Harnesses) -> None:
    harness = harnesses(tcp=False, unix=False)
    files = open_files()
    listener = harness.listener = harness.listen()
    harness.address = listener.address("node", "127.0.0.1")
    kinds = [kind for kind in LANE_CASES if "tags" not in kind]  # frames of one server either have tags or not
    clients = [harness.lane(kind) for kind in kinds]
    for client in clients:
        client.lane.pull(0, LIMIT_S)
    silent = [harness.connected(kind) for kind in kinds]
    asked = [harness.greeted(kind) for kind in kinds]
    for stream in silent:
        assert exactly(stream, GREETING_SIZE)
    passed = socket.recv_fds(asked[0], WELCOME_SIZE, 1)[1]
    listener.close()
    harness.listener.wait_until_all_left()
    assert all(map(closed, [*silent, *asked]))
    for client in clients:
        client.lane.close()
        harness.forget(client)
    for stream in (*silent, *asked):
        stream.close()
    for file in passed:
        os.close(file)
    del clients, client  # mapped memory keeps a descriptor open
    assert open_files() <= files
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("psgd-")]
