from __future__ import annotations

import gc
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from psgd.core.server.partitions import Partition
from psgd.serving import connection
from psgd.serving.limited_log import LimitedLog
from psgd_workers.errors import FrameError, LaneError, LaneTimeoutError, ServerGoneError, SharedMemoryError
from psgd_workers.messages import Outcome, Receipt, Version
from psgd_workers.transport import frame_stream, memory, shm
from psgd_workers.transport.frame_stream import FrameStream
from psgd_workers.transport.frames import HEADER_SIZE
from psgd_workers.transport.handshake import HELLO_SIZE, WELCOME_SIZE, Greeting, Hello
from psgd_workers.transport.memory import Segment
from psgd_workers.transport.streams import receive
from tests.support.server_harness import (
    BIG,
    DC_ASGD,
    FIRST,
    INT8,
    LANE_CASES,
    LIMIT_S,
    NUM_PARAMETERS,
    PART,
    SECOND,
    V1,
    Harnesses,
    LaneCase,
    batch,
    exactly,
    randoms,
)

if not memory.has_shared_memory():
    pytest.skip("needs Linux' anonymous shared memory", allow_module_level=True)


# Lanes


@pytest.mark.parametrize("kind", LANE_CASES)
@pytest.mark.parametrize("copies_itself", [True, False], ids=["", "copied"])
@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"compression": {"name": "fp16"}},
        {"compression": {"name": "top_k", "ratio": 0.2}},
        {"compression": {"name": "scaled_sign"}},
        INT8,
        DC_ASGD,
        DC_ASGD | INT8,
        {"correction": {"name": "dana", "momentum": 0.5}},
    ],
    ids=lambda sections: "-".join(section["name"] for section in sections.values()),
)
def test_a_lane_gives_the_bits_of_a_server_called_directly(
    monkeypatch: pytest.MonkeyPatch, harnesses: Harnesses, kind: LaneCase, sections: Any, copies_itself: bool
) -> None:
    monkeypatch.setattr(shm, "stores_are_ordered", lambda: copies_itself)
    harness = harnesses(sections=sections)
    direct = harness.reference()
    client = harness.lane(kind)
    outside = client.segment.slots[0].weights
    outside[:] = 5
    read = [client.lane.pull(slot, LIMIT_S) for slot in (0, 1)]
    assert read == [V1, V1]
    for number in range(6):
        slot = number % 2
        gradient = client.gradient(slot, batch(number), read[slot], seed=number)
        expected = direct.push(gradient, now=1.0)
        receipt = client.lane.push(gradient, slot, wants=True).receipt(LIMIT_S)
        assert (receipt,) == expected
        assert client.weights(slot).tobytes() == direct.published.tobytes()
        assert client.lane.version(LIMIT_S) == direct.version
        read[slot] = receipt.version
    assert harness.untouched() is False
    assert harness.report().staleness == {0: 1, 1: 5}
    assert outside[: PART.start].tolist() == [5] * PART.start
    assert outside[PART.stop :].tolist() == [5] * (NUM_PARAMETERS - PART.stop)


@pytest.mark.parametrize("kind", LANE_CASES)
def test_pushes_of_several_slots_are_answered_whatever_is_asked_for_first(harnesses: Harnesses, kind: LaneCase) -> None:
    harness = harnesses()
    direct = harness.reference()
    client = harness.lane(kind)
    gradients = [client.gradient(slot, batch(slot), V1, seed=slot) for slot in range(3)]
    expected = [direct.push(gradient, now=1.0)[0] for gradient in gradients]
    pending = [client.lane.push(gradient, slot, wants=False) for slot, gradient in enumerate(gradients)]
    receipts = [pending[slot].receipt(LIMIT_S) for slot in (2, 0, 1)]
    assert receipts == [expected[slot] for slot in (2, 0, 1)]
    assert client.lane.pull(1, LIMIT_S) == Version(1, 3)
    assert client.weights(1).tobytes() == direct.published.tobytes()


WHOLE = {"partition": Partition(0, 0, NUM_PARAMETERS, NUM_PARAMETERS)}


@pytest.fixture
def processors() -> Iterator[set[int]]:
    """Return the processors that this thread may run on, and allow all of them again after the test."""
    allowed = os.sched_getaffinity(0)
    yield allowed
    os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize("kind", LANE_CASES)
def test_a_push_that_wants_no_weights_leaves_the_slots_as_they_are(harnesses: Harnesses, kind: LaneCase) -> None:
    harness = harnesses()
    client = harness.lane(kind)
    client.weights(0)[:] = 3
    client.lane.push(client.gradient(0, FIRST, V1), 0, wants=False).receipt(LIMIT_S)
    assert client.weights(0).tolist() == [3] * harness.size


@pytest.mark.parametrize("kinds", [(kind, kind) for kind in LANE_CASES] + [("shm", "tcp")])
def test_a_parked_receipt_comes_when_the_last_worker_has_pushed(
    harnesses: Harnesses, kinds: tuple[LaneCase, LaneCase]
) -> None:
    harness = harnesses("bsp", 2)
    harness.join("worker-0", "worker-1")
    direct = harness.reference()
    for worker in ("worker-0", "worker-1"):
        direct.join(worker, now=0.0)
    clients = [harness.lane(kind, f"worker-{number}") for number, kind in enumerate(kinds)]
    for step in range(3):
        read = Version(1, step)
        gradients = [client.gradient(step, batch(2 * step + n), read, n) for n, client in enumerate(clients)]
        assert direct.push(gradients[0], now=1.0) == ()
        expected = direct.push(gradients[1], now=1.0)
        first = clients[0].lane.push(gradients[0], step, wants=True)
        harness.arrived()
        assert harness.report().parked == {"worker-0"}
        second = clients[1].lane.push(gradients[1], step, wants=True)
        harness.arrived()
        assert (first.receipt(LIMIT_S), second.receipt(LIMIT_S)) == expected
        for client in clients:
            assert client.weights(step).tobytes() == direct.published.tobytes()


@pytest.mark.parametrize("kind", LANE_CASES)
def test_a_worker_whose_push_is_parked_may_ask_for_the_version_and_pull_elsewhere(
    harnesses: Harnesses, kind: LaneCase
) -> None:
    harness = harnesses("bsp", 2)
    harness.join("worker-0", "worker-1")
    client = harness.lane(kind)
    pending = client.lane.push(client.gradient(0, FIRST, V1), 0, wants=True)
    harness.arrived()
    assert client.lane.version(LIMIT_S) == V1
    assert client.lane.pull(1, LIMIT_S) == V1
    assert client.weights(1).tobytes() == harness.weights.tobytes()
    harness.host.leave("worker-1")
    assert pending.receipt(LIMIT_S).version == Version(1, 1)
    assert client.weights(0).tobytes() == harness.published.values.tobytes()


def test_a_server_that_is_always_in_the_middle_is_asked_for_a_copy(harnesses: Harnesses) -> None:
    harness = harnesses()
    client = harness.lane("shm")
    harness.published.begin()
    assert client.lane.pull(2, LIMIT_S) == V1
    harness.published.end(V1)
    assert client.weights(2).tobytes() == harness.weights.tobytes()


@pytest.mark.parametrize("kind", LANE_CASES)
def test_a_batch_pushed_again_over_a_new_connection_is_a_duplicate(harnesses: Harnesses, kind: LaneCase) -> None:
    harness = harnesses()
    for outcome in (Outcome.APPLIED, Outcome.DUPLICATE):
        client = harness.lane(kind)
        assert client.lane.push(client.gradient(0, FIRST, V1), 0, wants=False).receipt(LIMIT_S).outcome is outcome
        client.lane.close()


@pytest.mark.parametrize("kind", LANE_CASES)
def test_what_was_pushed_before_a_worker_hung_up_is_in_the_step(harnesses: Harnesses, kind: LaneCase) -> None:
    """The server reads the worker's memory when the round closes, long after the connection is gone."""
    harness = harnesses("bsp", 2)
    harness.join("worker-0", "worker-1")
    direct = harness.reference()
    for worker in ("worker-0", "worker-1"):
        direct.join(worker, now=0.0)
    gone = harness.lane(kind, "worker-0")
    client = harness.lane(kind, "worker-1")
    lost = gone.gradient(0, batch(0), V1, seed=0)
    direct.push(lost._replace(values=randoms(0)[harness.part]), now=1.0)
    gone.lane.push(lost, 0, wants=True)
    harness.arrived()
    gone.lane.close()
    del gone, lost
    gradient = client.gradient(0, batch(1), V1, seed=1)
    expected = direct.push(gradient, now=1.0)
    assert client.lane.push(gradient, 0, wants=True).receipt(LIMIT_S) == expected[1]
    assert client.weights(0).tobytes() == direct.published.tobytes()


@contextmanager
def false_server(kind: LaneCase, answer: Callable[[socket.socket], object]) -> Iterator[dict[str, Any]]:
    """Listen as a server that does not belong to this run. Yield the changed fields of the address."""
    listening = socket.socket(socket.AF_UNIX if "tcp" not in kind else socket.AF_INET)
    listening.bind(("127.0.0.1", 0) if "tcp" in kind else f"\0psgd-false-{os.getpid()}")
    listening.listen()
    listening.settimeout(LIMIT_S)

    def serve() -> None:
        with listening.accept()[0] as stream:
            stream.settimeout(LIMIT_S)
            answer(stream)

    thread = threading.Thread(target=serve)
    thread.start()
    name = listening.getsockname()
    yield {"port": name[1]} if "tcp" in kind else {"path": name[1:].decode()}
    thread.join(LIMIT_S)
    listening.close()
    assert not thread.is_alive()


@pytest.mark.parametrize("kind", LANE_CASES)
def test_a_worker_gives_nothing_to_a_server_without_the_key(harnesses: Harnesses, kind: LaneCase) -> None:
    received: list[bytes] = []

    def pretend(stream: socket.socket) -> None:
        stream.sendall(Greeting.new().pack())
        received.append(exactly(stream, HELLO_SIZE))
        if "tcp" not in kind:
            socket.send_fds(stream, [bytes(WELCOME_SIZE)], [harness.published.file])
        else:
            stream.sendall(bytes(WELCOME_SIZE))
        message, files, _, _ = socket.recv_fds(stream, 1, 1)
        received.append(message)
        assert files == []

    harness = harnesses()
    with (
        false_server(kind, pretend) as changes,
        pytest.raises(FrameError, match="the server at this address does not have this run's key"),
    ):
        harness.lane(kind, address=harness.address._replace(**changes))
    assert [len(message) for message in received] == [HELLO_SIZE, 0]


@pytest.mark.parametrize("kind", LANE_CASES)
def test_a_worker_does_not_wait_for_a_server_that_says_nothing(harnesses: Harnesses, kind: LaneCase) -> None:
    harness = harnesses()
    began = time.monotonic()
    with (
        false_server(kind, lambda stream: stream.recv(1)) as changes,
        pytest.raises(LaneTimeoutError, match=r"no answer from the server within 0\.1 s"),
    ):
        harness.lane(kind, address=harness.address._replace(**changes), timeout_s=0.1)
    assert time.monotonic() - began < LIMIT_S / 2


@pytest.mark.parametrize("kind", LANE_CASES)
def test_a_server_that_sends_a_byte_at_a_time_does_not_extend_the_limit(harnesses: Harnesses, kind: LaneCase) -> None:
    def drip(stream: socket.socket) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # the worker has hung up
            for byte in Greeting.new().pack():
                stream.sendall(bytes([byte]))
                if select.select([stream], [], [], 0.05)[0]:
                    return
            raise AssertionError("the worker waited for the whole greeting")

    harness = harnesses()
    with (
        false_server(kind, drip) as changes,
        pytest.raises(LaneTimeoutError, match=r"no answer from the server within 0\.2 s"),
    ):
        harness.lane(kind, address=harness.address._replace(**changes), timeout_s=0.2)


@pytest.mark.parametrize("kind", LANE_CASES)
def test_a_server_that_hangs_up_in_the_handshake_is_a_lane_error(harnesses: Harnesses, kind: LaneCase) -> None:
    harness = harnesses()

    def welcome(stream: socket.socket) -> None:
        greeting = Greeting.new()
        stream.sendall(greeting.pack())
        hello = Hello.unpack(exactly(stream, HELLO_SIZE), harness.listener.key, greeting)
        if "tcp" not in kind:
            socket.send_fds(stream, [hello.welcome(harness.listener.key)], [harness.published.file])

    with false_server(kind, welcome) as changes, pytest.raises(ServerGoneError):
        harness.lane(kind, address=harness.address._replace(**changes))


@pytest.mark.parametrize("kind", LANE_CASES)
def test_where_nobody_listens_is_a_lane_error(harnesses: Harnesses, kind: LaneCase) -> None:
    harness = harnesses()
    harness.listener.close()
    with pytest.raises(ServerGoneError, match="cannot reach the server at"):
        harness.lane(kind)


@pytest.mark.parametrize(
    ("kind", "change", "error"), [("shm", {"path": None}, SharedMemoryError), ("tcp", {"port": None}, ServerGoneError)]
)
def test_a_lane_that_a_server_does_not_offer_is_refused(
    harnesses: Harnesses, kind: LaneCase, change: dict[str, None], error: type[LaneError]
) -> None:
    harness = harnesses(tcp=False)
    with pytest.raises(error, match="the server does not listen on"):
        harness.lane(kind, address=harness.address._replace(**change))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", LANE_CASES)
def test_an_answer_that_breaks_the_protocol_is_told_apart_from_a_server_that_is_gone(
    monkeypatch: pytest.MonkeyPatch, harnesses: Harnesses, kind: LaneCase
) -> None:
    monkeypatch.setattr(connection, "_header", lambda *arguments: bytes(HEADER_SIZE))
    harness = harnesses()
    client = harness.lane(kind)
    # So that the lane asks the server for the weights.
    monkeypatch.setattr(memory.PublishedVector, "snapshot", lambda *arguments: None)
    with pytest.raises(FrameError, match="a frame begins with"):
        client.lane.pull(0, LIMIT_S)


# Endings


@pytest.mark.parametrize("kind", LANE_CASES)
def test_a_server_that_goes_while_a_receipt_is_awaited_is_a_lane_error(harnesses: Harnesses, kind: LaneCase) -> None:
    harness = harnesses("bsp", 2)
    harness.join("worker-0", "worker-1")
    client = harness.lane(kind)
    pending = [client.lane.push(client.gradient(slot, batch(slot), V1), slot, wants=True) for slot in (0, 1)]
    harness.arrived(2)
    harness.listener.close()
    for push in pending:
        with pytest.raises(ServerGoneError, match="the server is gone") as error:
            push.receipt(60 * LIMIT_S)
        assert not isinstance(error.value, LaneTimeoutError)
    with pytest.raises(ServerGoneError, match="the server is gone"):
        client.lane.push(client.gradient(2, batch(2), V1), 2, wants=True).receipt(60 * LIMIT_S)


@pytest.mark.parametrize("kind", LANE_CASES)
def test_a_receipt_is_not_waited_for_after_hanging_up(harnesses: Harnesses, kind: LaneCase) -> None:
    harness = harnesses("bsp", 2)
    harness.join("worker-0", "worker-1")
    client = harness.lane(kind)
    pending = client.lane.push(client.gradient(0, FIRST, V1), 0, wants=True)
    harness.arrived()
    hanging_up = threading.Timer(0.1, client.lane.hang_up)  # most likely during the wait, but it need not be
    hanging_up.start()
    with pytest.raises(ServerGoneError, match="the server is gone") as error:
        pending.receipt(60 * LIMIT_S)
    assert not isinstance(error.value, LaneTimeoutError)
    hanging_up.join(LIMIT_S)


def test_a_server_that_goes_in_the_middle_of_its_weights_is_a_lane_error(harnesses: Harnesses) -> None:
    harness = harnesses("bsp", 2, **BIG)
    harness.join("worker-0", "worker-1")
    client = harness.lane("tcp", slots=1)
    pending = client.lane.push(client.gradient(0, FIRST, V1), 0, wants=True)
    harness.arrived()

    harness.host.leave("worker-1")  # the receipt is due; the weights are more than the socket takes at once
    harness.listener.close()
    with pytest.raises(ServerGoneError, match="the server is gone") as error:
        pending.receipt(60 * LIMIT_S)
    assert not isinstance(error.value, LaneTimeoutError)


@pytest.mark.parametrize("kind", LANE_CASES)
def test_no_receipt_in_time_is_a_timeout(harnesses: Harnesses, kind: LaneCase) -> None:
    harness = harnesses("bsp", 2)
    harness.join("worker-0", "worker-1")
    client = harness.lane(kind)
    pending = client.lane.push(client.gradient(0, FIRST, V1), 0, wants=True)
    began = time.monotonic()
    with pytest.raises(LaneTimeoutError, match=r"no answer from the server within 0\.1 s"):
        pending.receipt(0.1)
    assert 0.1 <= time.monotonic() - began < LIMIT_S / 2


@pytest.mark.parametrize("kind", LANE_CASES)
def test_a_server_that_hangs_is_a_timeout(
    monkeypatch: pytest.MonkeyPatch, harnesses: Harnesses, kind: LaneCase
) -> None:
    monkeypatch.setattr(shm, "stores_are_ordered", lambda: False)  # so that the shm lane asks the server, too
    harness = harnesses()
    client = harness.lane(kind)
    began = time.monotonic()
    with harness.frozen(), pytest.raises(LaneTimeoutError, match=r"no answer from the server within 0\.1 s"):
        client.lane.pull(0, 0.1)
    assert 0.1 <= time.monotonic() - began < LIMIT_S / 2


@pytest.mark.parametrize("slots", [1, 2], ids=["in the calling thread", "in the sending thread"])
def test_a_push_that_the_server_does_not_take_can_be_given_up(
    monkeypatch: pytest.MonkeyPatch, harnesses: Harnesses, slots: int
) -> None:
    harness = harnesses(**BIG)
    given_up = threading.Event()

    def no_payload(stream: socket.socket, into: memoryview) -> int:
        if len(into) > HEADER_SIZE:
            assert given_up.wait(LIMIT_S)
        return receive(stream, into)

    monkeypatch.setattr(frame_stream, "receive", no_payload)
    client = harness.lane("tcp", slots=slots)
    client.lane.version(0.1)
    began = time.monotonic()
    with pytest.raises(LaneTimeoutError):
        client.lane.push(client.gradient(0, FIRST, V1), 0, wants=False).receipt(0.1)
    client.lane.close()
    given_up.set()
    assert time.monotonic() - began < LIMIT_S / 2
    harness.log.wait("of worker-0 was closed: the other end closed it in the middle of a frame")
    assert harness.untouched()


@pytest.fixture
def no_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("kind", [kind for kind in LANE_CASES if "shm" in kind])
def test_the_memory_of_a_worker_that_has_hung_up_is_let_go(harnesses: Harnesses, kind: LaneCase) -> None:
    harness = harnesses()
    before = mapped()
    for position in range(5):
        client = harness.lane(kind)
        client.lane.push(client.gradient(0, batch(position), V1), 0, wants=True).receipt(LIMIT_S)
        assert mapped() == before + 2
        client.lane.close()
        harness.forget(client)
        del client
        harness.listener.wait_until_all_left()
        assert harness.streams() == []
        assert mapped() == before


@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("kind", LANE_CASES)
def test_the_memory_of_a_worker_whose_server_is_gone_is_let_go(harnesses: Harnesses, kind: LaneCase) -> None:
    """The memory may be large, and a worker that has lost its server soon needs as much again."""
    harness = harnesses("bsp", 2)
    harness.join("worker-0", "worker-1")
    before = mapped()
    client = harness.lane(kind)
    pending = client.lane.push(client.gradient(0, FIRST, V1), 0, wants=True)
    harness.arrived()
    harness.listener.close()
    with pytest.raises(ServerGoneError, match="the server is gone"):
        pending.receipt(LIMIT_S)
    with pytest.raises(ServerGoneError, match="the server is gone"):
        client.lane.push(client.gradient(1, SECOND, V1), 1, wants=True).receipt(LIMIT_S)
    harness.host.leave("worker-1")  # the server needs the memory until the step
    client.lane.close()
    harness.forget(client)
    del client, pending
    assert mapped() == before


@pytest.mark.usefixtures("no_gc")
def test_the_memory_of_a_worker_that_was_gone_before_its_receipt_is_let_go(harnesses: Harnesses) -> None:
    harness = harnesses()
    before = mapped()
    ours, its = socket.socketpair()
    segment = Segment(NUM_PARAMETERS, 1)
    served = connection.WorkerConnection(
        harness.host,
        harness.push_format,
        harness.part,
        ours,
        FrameStream(ours),
        harness.hello("shm"),
        segment,
        LimitedLog(),
    )
    its.close()
    served._answer_push(0, False, Receipt("by-hand", FIRST, Outcome.APPLIED, V1))()
    assert "Broken pipe" in served._answers.fault
    segment.close()
    ours.close()
    del served, segment
    assert mapped() == before


def mapped() -> int:
    """Return the number of segments that this process has mapped."""
    return Path("/proc/self/maps").read_text(encoding="ascii").count("/memfd:psgd-segment")
