"""Connections whose pushes are served in compiled code, over real sockets."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from psgd.core.server.partitions import Partition
from psgd.serving import listener
from psgd.spec import Settings
from psgd_workers.errors import ServerGoneError
from psgd_workers.messages import Outcome, Receipt, Version
from psgd_workers.transport.authentication import TAG_SIZE
from psgd_workers.transport.frames import HEADER_SIZE, Frame, FrameKind
from tests.support.server_harness import (
    BIG,
    IS_COMPILED,
    LIMIT_S,
    V1,
    Harnesses,
    LaneCase,
    ServerHarness,
    WorkerHarness,
    batch,
    closed,
    exactly,
    header,
    push_frame,
)
from tests.support.tagged_socket import TaggedSocket

if not IS_COMPILED:
    pytest.skip("the push path is not compiled", allow_module_level=True)

from psgd.serving.compiled.serve import SETTLED  # imports Numba

TAGS: LaneCase = "compiled tcp with tags"
CASES: list[LaneCase] = ["compiled shm", "compiled tcp", TAGS]
LAST = 90  # batches of an epoch


def joined(harness: ServerHarness, kind: LaneCase, worker: str = "worker-0", slots: int = 1) -> WorkerHarness:
    client = harness.lane(kind, worker, slots)
    harness.join(worker)
    return client


def push(client: WorkerHarness, position: int, read: Version, slot: int = 0) -> Receipt:
    gradient = client.gradient(slot, batch(position), read, seed=position)
    return client.lane.push(gradient, slot, wants=True).receipt(LIMIT_S)


def send_first(harness: ServerHarness, stream: socket.socket) -> None:
    """Push the first batch of the epoch, which Python applies."""
    stream.sendall(push_frame(harness, 0))
    assert Frame.unpack(exactly(stream, HEADER_SIZE)).version == Version(1, 1)
    assert by_python(harness) == 1


def by_python(harness: ServerHarness) -> int:
    """Return the number of pushes that compiled code left to Python since the last call."""
    pushes = harness.host.pushes
    harness.host.pushes = 0
    return pushes


@pytest.mark.parametrize("kind", CASES)
def test_all_pushes_but_the_ends_of_an_epoch_are_served_in_compiled_code(harnesses: Harnesses, kind: LaneCase) -> None:
    harness = harnesses()
    reference = harness.reference()
    client = joined(harness, kind)
    reference.join("worker-0", 0.0)
    read = V1
    for position in range(LAST):
        gradient = client.gradient(0, batch(position), read, seed=position)
        expected = reference.push(gradient, now=1.0)[0]
        receipt = client.lane.push(gradient, 0, wants=True).receipt(LIMIT_S)
        assert receipt == expected
        assert client.weights(0).tobytes() == reference.published.tobytes()
        read = receipt.version
    assert asyncio.run(harness.host.report(wait=False)).compiled == 1 - 2 / LAST
    assert by_python(harness) == 2, "the first and the last push of the epoch"
    ours, theirs = (server.journal.take() for server in (harness.server, reference))
    names = [name for name in ours.dtype.names or () if name not in ("now", "compute_s")]
    assert ours[names].tolist() == theirs[names].tolist()
    assert harness.server.epochs == reference.epochs == 1
    np.testing.assert_array_equal(harness.server.epoch_weights(1), reference.epoch_weights(1))


@pytest.mark.parametrize("kind", CASES)
def test_the_slots_of_a_pipeline_are_served_in_turn(harnesses: Harnesses, kind: LaneCase) -> None:
    harness = harnesses()
    client = joined(harness, kind, slots=3)
    push(client, 0, V1)
    pending = [
        client.lane.push(client.gradient(slot, batch(1 + slot), V1, seed=slot), slot, wants=True) for slot in range(3)
    ]
    assert [one.receipt(LIMIT_S).outcome for one in pending] == [Outcome.APPLIED] * 3
    assert by_python(harness) == 1


@pytest.mark.parametrize("kind", CASES)
def test_pushes_are_left_to_python_while_the_mode_waits(harnesses: Harnesses, kind: LaneCase) -> None:
    harness = harnesses()
    client = joined(harness, kind)
    version = push(client, 0, V1).version
    version = push(client, 1, version).version
    assert by_python(harness) == 1
    settings = harness.server.settings.model_dump()
    for mode, compiled in (({"mode": "bsp"}, False), ({"mode": "async"}, True), ({"mode": "ssp", "s": 1}, False)):
        harness.host.change(Settings.model_validate(settings | {"consistency": mode}))
        first = harness.server.version.updates + 1
        version = push(client, first, version).version  # the thread may be in compiled code, or wait in Python
        version = push(client, first + 1, version).version
        assert by_python(harness) in ((0, 1) if compiled else (2,))  # 0: the thread was still on its way to Python
    assert harness.settled() == version.updates


@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="there is no other processor")
def test_a_thread_follows_its_worker_until_python_serves(harnesses: Harnesses, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = max(os.sched_getaffinity(0))
    monkeypatch.setattr("psgd_workers.transport.shm.current_processor", lambda: processor)

    def followers() -> int:
        threads = [int(path.name) for path in Path("/proc/self/task").iterdir()]
        return sum(os.sched_getaffinity(thread) == {processor} for thread in threads)

    harness = harnesses(partition=Partition(0, 0, 40, 40), num_parameters=40)
    client = joined(harness, "compiled shm")
    version = V1
    for position in range(SETTLED + 2):
        version = push(client, position, version).version
    assert followers() == 1
    settings = harness.server.settings.model_dump() | {"consistency": {"mode": "ssp", "s": 1}}
    harness.host.change(Settings.model_validate(settings))
    for position in range(SETTLED + 2, SETTLED + 4):  # the thread is in Python after the first of these
        version = push(client, position, version).version
    assert followers() == 0


@pytest.mark.parametrize("kind", CASES)
def test_what_is_no_usual_case_is_refused_as_ever(harnesses: Harnesses, kind: LaneCase) -> None:
    harness = harnesses()
    client = joined(harness, kind)
    version = push(client, 0, V1).version
    version = push(client, 1, version).version
    again = push(client, 1, version)
    assert (again.outcome, again.version) == (Outcome.DUPLICATE, version)
    other = push(client, 2, Version(9, 0))
    assert other.outcome is Outcome.REQUEUED
    gradient = client.gradient(0, batch(2), version)._replace(norm=float("nan"))
    assert client.lane.push(gradient, 0, wants=False).receipt(LIMIT_S).outcome is Outcome.REJECTED
    assert push(client, 2, version).outcome is Outcome.APPLIED


@pytest.mark.parametrize("kind", CASES)
def test_a_worker_that_left_is_served_by_python_until_it_joins_again(harnesses: Harnesses, kind: LaneCase) -> None:
    harness = harnesses()
    client = joined(harness, kind)
    version = push(client, 0, V1).version
    harness.host.leave("worker-0")
    version = push(client, 1, version).version
    version = push(client, 2, version).version
    assert by_python(harness) == 3
    harness.join("worker-0")
    push(client, 3, version)
    push(client, 4, version)
    assert by_python(harness) <= 1
    assert harness.report().worker_pushes == {"worker-0": 2}


@pytest.mark.parametrize("kind", CASES)
def test_reports_and_states_are_taken_while_threads_wait_for_pushes(harnesses: Harnesses, kind: LaneCase) -> None:
    harness = harnesses()
    client = joined(harness, kind)
    version = V1
    for position in range(5):
        version = push(client, position, version).version
    state, records = asyncio.run(harness.host.snapshot(LIMIT_S))
    assert state.metadata["version"] == [1, 5]
    assert len(records) == 6
    assert harness.report().pushes["applied"] == 5
    assert push(client, 5, version).version == Version(1, 6)


@pytest.mark.parametrize("kind", CASES)
def test_a_closed_listener_ends_the_threads_in_compiled_code(harnesses: Harnesses, kind: LaneCase) -> None:
    harness = harnesses()
    client = joined(harness, kind)
    push(client, 0, V1)
    push(client, 1, V1)
    harness.listener.close()
    assert "psgd-connection" not in [thread.name for thread in threading.enumerate()]
    with pytest.raises(ServerGoneError):
        push(client, 2, V1)


@pytest.mark.parametrize("kind", CASES)
def test_a_server_that_fails_in_python_takes_no_push_in_compiled_code(
    harnesses: Harnesses, kind: LaneCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = harnesses()
    client = joined(harness, kind)
    other = joined(harness, kind, "worker-1")
    push(client, 0, V1)
    push(client, 1, V1)

    def breaks(*arguments: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(harness.server, "skip", breaks)
    with pytest.raises(MemoryError):
        harness.host.skip(batch(9))
    for worker, position in ((client, 2), (other, 3)):
        with pytest.raises(ServerGoneError):
            push(worker, position, V1)
    assert harness.server.version == Version(1, 2)


@pytest.mark.parametrize("changes", [{"slot": 7}, {"code": 3}, {"incarnation": 9}, {"payload": 1 << 60}], ids=str)
@pytest.mark.parametrize("kind", CASES)
def test_a_header_of_no_worker_closes_the_connection_with_one_line(
    harnesses: Harnesses, kind: LaneCase, changes: dict[str, Any]
) -> None:
    harness = harnesses()
    stream = harness.shaken(kind)
    harness.join("by-hand")
    size = harness.push_format.sizes("tcp" not in kind)[0]
    for position in range(2):
        stream.sendall(header(harness, batch=batch(position), payload=size, number=position + 1).pack() + bytes(size))
        answer = Frame.unpack(exactly(stream, HEADER_SIZE))
        assert (answer.kind, answer.version) == (FrameKind.RECEIPT, Version(1, position + 1))
    assert by_python(harness) == 1
    stream.sendall(header(harness, **({"batch": batch(5), "payload": size, "number": 3} | changes)).pack())
    assert closed(stream)
    harness.log.wait("the connection of by-hand was closed")
    assert harness.log.count("was closed") == 1
    assert harness.server.version == Version(1, 2)


@pytest.mark.parametrize("cut", [1, HEADER_SIZE - 1, HEADER_SIZE + 5, HEADER_SIZE + TAG_SIZE + 5])
@pytest.mark.parametrize("kind", ["compiled tcp", TAGS])
def test_a_frame_that_is_cut_in_the_middle_is_not_applied(harnesses: Harnesses, kind: LaneCase, cut: int) -> None:
    harness = harnesses()
    stream = harness.shaken(kind)
    harness.join("by-hand")
    send_first(harness, stream)
    frame = push_frame(harness, 1)
    if isinstance(stream, TaggedSocket):
        stream.send_wire(stream.tagged(frame)[:cut])
    else:
        stream.sendall(frame[:cut])
    stream.shutdown(socket.SHUT_WR)
    assert closed(stream)
    harness.log.wait("the other end closed it in the middle of a frame")
    assert harness.server.version == Version(1, 1)


@pytest.mark.parametrize("kind", ["tcp", "tcp with tags", "compiled tcp", TAGS])
def test_a_worker_that_reads_no_weights_is_waited_for_with_a_limit(
    harnesses: Harnesses, kind: LaneCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "SEND_S", 1)
    harness = harnesses(**BIG)
    stream = harness.shaken(kind)
    harness.join("by-hand")
    size = harness.push_format.sizes(shared=False)[0]
    for position in range(2):
        push_header = header(harness, batch=batch(position), payload=size, number=position + 1, wants=True)
        with suppress(ConnectionError):
            stream.sendall(push_header.pack() + bytes(size))
    harness.log.wait("the connection of by-hand was closed: the worker sends requests but does not read the answers")


def test_a_worker_that_reads_no_receipts_is_closed(harnesses: Harnesses) -> None:
    harness = harnesses()
    stream = harness.shaken("compiled shm")
    harness.join("by-hand")
    for number in range(1, 1000):  # more than a socket buffers
        with suppress(ConnectionError):
            stream.sendall(header(harness, batch=batch(number % 89), payload=0, number=number).pack())
    harness.log.wait("the worker sends requests but does not read the answers")
