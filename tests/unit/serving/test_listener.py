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
from psgd_workers.errors import LaneError
from psgd_workers.messages import BatchId, Outcome, Version
from psgd_workers.transport import memory
from psgd_workers.transport.frames import HEADER_SIZE, Frame, Kind
from psgd_workers.transport.handshake import GREETING_SIZE, HELLO_SIZE, WELCOME_SIZE, Greeting
from tests.support.server_harness import (
    FIRST,
    KINDS,
    LIMIT_S,
    PART,
    PULL,
    V1,
    Kinds,
    Stage,
    Stages,
    batch,
    closed,
    exactly,
    header,
    open_files,
    works,
)

if not memory.has_shared_memory():
    pytest.skip("needs Linux' nameless shared memory", allow_module_level=True)


# Handshakes


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_without_the_key_is_dropped(stages: Stages, kind: Kinds) -> None:
    stage = stages()
    with pytest.raises(LaneError, match="closed the connection; its log says why"):
        stage.lane(kind, address=stage.address._replace(key=bytes(32)))
    stage.log.wait("dropped in its handshake: a peer without this run's key")
    works(stage, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"incarnation": 2}, "expects incarnation, values, sharing 2, 90, .* in 2 slots; here they are .1, 90"),
        ({"num_parameters": 91}, "1, 91"),
        ({"num_parameters": 2**60}, f"1, {2**60}"),
        ({"slots": 0}, "in 0 slots"),
        ({"slots": 9}, "in 9 slots; .* slots 1 to 8"),
    ],
)
def test_a_worker_of_another_job_or_server_is_dropped(
    stages: Stages, kind: Kinds, changes: dict[str, int], reason: str
) -> None:
    stage = stages()
    assert closed(stage.greeted(kind, **changes))
    stage.log.wait(f"dropped in its handshake: by-hand .*{reason}")
    works(stage, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_who_shares_memory_comes_by_the_unix_socket_and_nobody_else(stages: Stages, kind: Kinds) -> None:
    stage = stages()
    assert closed(stage.greeted(kind, shared=kind == "tcp"))
    stage.log.wait("dropped in its handshake: by-hand expects")


@pytest.mark.parametrize("kind", KINDS)
def test_a_hello_that_was_overheard_opens_nothing(stages: Stages, kind: Kinds) -> None:
    stage = stages()
    greeting = Greeting.unpack(exactly(stage.connected(kind), GREETING_SIZE))
    overheard = stage.hello(kind).pack(stage.listener.key, greeting)
    thief = stage.connected(kind)
    thief.sendall(overheard)
    assert closed(thief)
    stage.log.wait("a peer without this run's key")


def test_a_name_that_is_no_text_is_dropped(stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = stages()
    stream = stage.connected("tcp")
    greeting = Greeting.unpack(exactly(stream, GREETING_SIZE))

    class Bytes(str):
        __slots__ = ()

        def encode(self, *arguments: Any) -> bytes:
            return b"\xff\xfe"

    stream.sendall(stage.hello("tcp", worker=Bytes()).pack(stage.listener.key, greeting))
    assert closed(stream)
    stage.log.wait("dropped in its handshake: 'utf-8' codec")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bytes_sent", [0, 1, HELLO_SIZE - 1])
def test_who_falls_silent_in_the_handshake_is_dropped(
    monkeypatch: pytest.MonkeyPatch, stages: Stages, kind: Kinds, bytes_sent: int
) -> None:
    monkeypatch.setattr(listener_module, "HANDSHAKE_S", 0.1)
    stage = stages()
    stream = stage.connected(kind)
    stream.sendall(bytes(bytes_sent))
    assert closed(stream)
    stage.log.wait("a peer was dropped: it did not finish its handshake within 0.1 s")


def test_who_does_not_pass_its_memory_is_dropped(monkeypatch: pytest.MonkeyPatch, stages: Stages) -> None:
    monkeypatch.setattr(listener_module, "HANDSHAKE_S", 0.1)
    stage = stages()
    assert closed(stage.greeted("shm"))
    stage.log.wait("did not finish its handshake within 0.1 s")


def no_file(stage: Stage) -> list[int]:
    return []


def a_pipe(stage: Stage) -> list[int]:
    reading, writing = os.pipe()
    os.close(writing)
    return [reading]


def memory_of(slots: int, more: int = 0, seals: int = fcntl.F_SEAL_SHRINK) -> Callable[[Stage], list[int]]:
    def made(stage: Stage) -> list[int]:
        file = os.memfd_create("psgd-test", os.MFD_ALLOW_SEALING)
        os.ftruncate(file, 2 * 4096 * slots + more)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
        return [file]

    return made


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (no_file, "it passed 0 descriptors of its memory, expected 1"),
        (a_pipe, "is no shared memory"),
        (memory_of(3), "shared memory of 24576 bytes came.*; expected 16384"),
        (memory_of(2, more=-1), "shared memory of 16383 bytes came"),
        (memory_of(2, seals=0), "seals 0x0; expected 16384 bytes, sealed in size"),
        (memory_of(2, seals=fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE), "cannot be mapped"),
    ],
)
def test_memory_that_is_none_is_refused(stages: Stages, files: Callable[[Stage], list[int]], reason: str) -> None:
    stage = stages()
    works(stage)
    before = open_files()
    stream = stage.greeted("shm")
    _, (its,), _, _ = socket.recv_fds(stream, WELCOME_SIZE, 1)
    passed = files(stage)
    socket.send_fds(stream, [b"\0"], passed)
    assert closed(stream)
    stage.log.wait(f"dropped in its handshake: .*{reason}")
    stream.close()
    for file in (its, *passed):
        os.close(file)
    assert open_files() <= before
    works(stage, 1)


# Frames that no worker sends


def broken(frame: Frame, place: int, value: int) -> bytes:
    """With another byte, and the right checksum."""
    fields = bytearray(frame.pack()[: HEADER_SIZE - 4])
    fields[place] = value
    return bytes(fields) + struct.pack("<I", crc32(fields))


BAD_FRAMES: dict[str, tuple[Callable[[Stage, Frame], bytes], str]] = {
    "garbage": (lambda stage, push: b"GET / HTTP/1.1\r\n".ljust(HEADER_SIZE), "begins with b'GET '"),
    "checksum": (lambda stage, push: push.pack()[:-1] + b"\0", "checksum"),
    "format": (lambda stage, push: broken(push, 4, 2), "format 2"),
    "unknown kind": (lambda stage, push: broken(push, 5, 9), "of kind 9"),
    "receipt": (lambda stage, push: push._replace(kind=Kind.RECEIPT).pack(), "RECEIPT with .* which no worker sends"),
    "weights": (lambda stage, push: push._replace(kind=Kind.WEIGHTS).pack(), "WEIGHTS with"),
    "full pull": (lambda stage, push: PULL._replace(payload=4).pack() + bytes(4), "PULL with 4 bytes of payload"),
    "full ask": (lambda stage, push: PULL._replace(kind=Kind.ASK, payload=2**63).pack(), "ASK with"),
    "incarnation": (lambda stage, push: push._replace(incarnation=2).pack(), "for incarnation 2, and this is 1"),
    "slot": (lambda stage, push: push._replace(slot=2).pack(), "from slot 2, which does not exist"),
    "slot of ask": (lambda stage, push: PULL._replace(kind=Kind.ASK, slot=255).pack(), "from slot 255"),
    "code": (lambda stage, push: push._replace(code=3).pack(), "values of code 3, expected 0"),
    "oversized": (lambda stage, push: push._replace(payload=2**64 - 1).pack(), f"{2**64 - 1} bytes of payload"),
    "one too many": (lambda stage, push: push._replace(payload=push.payload + 1).pack(), "bytes of payload, expected"),
    "epoch": (lambda stage, push: push._replace(batch=BatchId(2, 0, 0)).pack(), "epochs up to 1"),
    "shard": (lambda stage, push: push._replace(batch=BatchId(0, 2, 0)).pack(), "batches by shard"),
    "index": (lambda stage, push: push._replace(batch=BatchId(0, 1, 40)).pack(), "batches by shard"),
    "last index": (lambda stage, push: push._replace(batch=BatchId(0, 0, 2**32 - 1)).pack(), "batches by shard"),
    "no examples": (lambda stage, push: push._replace(examples=0).pack(), "with 0 examples"),
    "examples": (lambda stage, push: push._replace(examples=901).pack(), "901 examples: .*900 examples in all"),
    "norm": (lambda stage, push: push._replace(norm=-1e-6).pack(), "norm -1e-06"),
    "time": (lambda stage, push: push._replace(compute_s=-1.0).pack(), r"computed in -1\.0 s"),
    "long time": (lambda stage, push: push._replace(compute_s=1e300).pack(), r"computed in 1e\+300 s"),
    "endless time": (lambda stage, push: push._replace(compute_s=inf).pack(), "computed in inf s"),
    "no time": (lambda stage, push: push._replace(compute_s=nan).pack(), "computed in nan s"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BAD_FRAMES)
def test_what_no_worker_sends_ends_its_connection_and_changes_nothing(stages: Stages, kind: Kinds, name: str) -> None:
    stage = stages()
    other = stage.lane(kind)
    stream, (make, reason) = stage.shaken(kind), BAD_FRAMES[name]
    push = header(stage, payload=stage.form.sizes(kind != "tcp")[-1])
    stream.sendall(make(stage, push))
    with suppress(ConnectionResetError, BrokenPipeError):  # the header alone may have ended it
        stream.sendall(bytes(push.payload))
    assert closed(stream)
    stage.log.wait(f"the connection of by-hand was closed: .*{reason}")
    assert stage.untouched()
    assert stage.report().bytes_pushed == 0
    receipt = other.lane.push(other.gradient(0, FIRST, V1), 0, wants=True).receipt(LIMIT_S)
    assert receipt.outcome is Outcome.APPLIED


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("again", [Kind.PUSH, Kind.PULL])
def test_a_slot_whose_receipt_is_not_given_takes_nothing(stages: Stages, kind: Kinds, again: Kind) -> None:
    stage = stages("bsp", 2)
    stage.join("by-hand", "worker-0")
    stream = stage.shaken(kind)
    push = header(stage, payload=stage.form.sizes(kind != "tcp")[-1])
    stream.sendall(push.pack() + np.ones(stage.size, np.float32).tobytes()[: push.payload])
    stage.arrived()
    size = push.payload if again is Kind.PUSH else 0
    stream.sendall(push._replace(kind=again, batch=batch(1), payload=size).pack())
    assert closed(stream)
    stage.log.wait("from slot 0, which does not exist, or whose receipt is not given")
    assert stage.untouched() is False, "what was pushed before is kept"
    assert stage.settled() == 1
    other = stage.lane(kind)
    receipt = other.lane.push(other.gradient(0, batch(2), V1), 0, wants=True).receipt(LIMIT_S)
    assert (receipt.outcome, receipt.version) == (Outcome.APPLIED, Version(1, 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("lengths", "arrays", "reason"),
    [
        ((3, 4), [1, 2, 3, 0, 0, 0, 0, 0], "3 indices for 4 values"),
        ((2, 2), [2, 1, 0, 0], "indices are not strictly ascending"),
        ((2, 2), [1, 1, 0, 0], "indices are not strictly ascending"),
        ((2, 2), [1, 60, 0, 0], "index 60, expected one below 60"),
        ((61, 1), [0] * 4, "61 values of 60"),
        ((2**64 - 1, 1), [0] * 4, f"{2**64 - 1} values of 60"),
        ((2, 10), [1, 2, 0, 0], "10 values of 60, in 36 bytes"),
        ((2, 8), [1, 2, 0, 0], "a push is 24 bytes short"),
        ((0, 0), [0] * 4, "16 bytes too many"),
    ],
)
def test_an_encoded_push_that_lies_about_its_arrays_ends_its_connection(
    stages: Stages, kind: Kinds, lengths: tuple[int, int], arrays: list[int], reason: str
) -> None:
    stage = stages(sections={"compression": {"name": "top_k", "ratio": 0.2}})
    stream = stage.shaken(kind)
    payload = struct.pack(f"<QQ{len(arrays)}I", *lengths, *arrays) + bytes(4 * (stage.size - PART.num_trainable))
    stream.sendall(header(stage, code=2, payload=len(payload)).pack() + payload)
    assert closed(stream)
    stage.log.wait(f"the connection of by-hand was closed: .*{reason}")
    assert stage.untouched()
    works(stage, kind=kind)


# Listening and ending


def test_no_free_port_is_an_error_that_says_what_to_do(stages: Stages) -> None:
    stage = stages()
    taken = stage.address.port
    assert taken is not None
    with pytest.raises(LaneError, match=f"no port from {taken} to {taken} is free on 127.0.0.1: widen scaling.ports"):
        stage.listen(unix=False, ports=(taken, taken))


def test_the_first_free_port_of_a_range_is_taken(stages: Stages) -> None:
    stage = stages(tcp=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        first = taken.getsockname()[1]
        listener = stage.listen(unix=False, ports=(first, first + 50))
    assert listener.port is not None
    assert first < listener.port <= first + 50
    listener.close()


def test_a_server_cannot_listen_on_another_machines_address(stages: Stages) -> None:
    stage = stages(tcp=False)
    with pytest.raises(LaneError, match=r"cannot listen on 192\.0\.2\.1:0"):
        stage.listener.listen_tcp("192.0.2.1", None)


def test_a_restarted_server_gets_its_port_back(stages: Stages) -> None:
    """The old one hung up first, so that the kernel keeps its connections for a minute."""
    stage = stages()
    crew, port = stage.lane("tcp"), stage.address.port
    assert port is not None
    crew.lane.pull(0, LIMIT_S)
    stage.listener.close()
    with pytest.raises(LaneError, match="the server is gone"):
        crew.lane.pull(0, LIMIT_S)
    crew.lane.close()
    stage.listener = stage.listen(ports=(port, port))
    stage.address = stage.listener.address("node", "127.0.0.1")
    assert stage.address.port == port
    works(stage, kind="tcp")


def test_a_closed_listener_leaves_nothing(stages: Stages) -> None:
    stage = stages(tcp=False, unix=False)
    files = open_files()
    listener = stage.listener = stage.listen()
    stage.address = listener.address("node", "127.0.0.1")
    crews = [stage.lane(kind) for kind in KINDS]
    for crew in crews:
        crew.lane.pull(0, LIMIT_S)
    silent = [stage.connected(kind) for kind in KINDS]
    asked = [stage.greeted(kind) for kind in KINDS]
    for stream in silent:
        assert exactly(stream, GREETING_SIZE)
    passed = socket.recv_fds(asked[0], WELCOME_SIZE, 1)[1]
    listener.close()
    stage.listener.all_gone()
    assert all(map(closed, [*silent, *asked]))
    for crew in crews:
        crew.lane.close()
        stage.forget(crew)
    for stream in (*silent, *asked):
        stream.close()
    for file in passed:
        os.close(file)
    del crews, crew  # mapped memory holds on to a descriptor
    assert open_files() <= files
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("psgd-")]
