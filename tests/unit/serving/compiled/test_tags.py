"""Connections whose frames have tags, served in compiled code over real sockets."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from psgd_workers.messages import Outcome, Version
from psgd_workers.transport.authentication import TAG_SIZE
from psgd_workers.transport.frames import HEADER_SIZE, Frame
from tests.support.server_harness import (
    BIG,
    IS_COMPILED,
    LIMIT_S,
    V1,
    Harnesses,
    LaneCase,
    ServerHarness,
    batch,
    closed,
    exactly,
    header,
    push_frame,
)
from tests.support.tagged_socket import TaggedSocket

if not IS_COMPILED:
    pytest.skip("the push path is not compiled", allow_module_level=True)

from psgd.serving.compiled.libcrypto import Libcrypto  # needs Numba
from psgd.serving.compiled.serve import PIECE

TAGS: LaneCase = "compiled tcp with tags"
WRONG = "the connection of by-hand was closed: a frame was changed, repeated or left out on its way: its tag is wrong"
GOOD = 3  # pushes before the wrong one; the first is applied by Python, the others by compiled code


def joined(harness: ServerHarness) -> tuple[TaggedSocket, bytes]:
    """Return a connection after some pushes, and the last of these on the wire. Its thread waits in compiled code."""
    stream = harness.shaken(TAGS)
    assert isinstance(stream, TaggedSocket)
    harness.join("by-hand")
    for position in range(GOOD):
        wire = stream.tagged(push_frame(harness, position))
        stream.send_wire(wire)
        assert Frame.unpack(exactly(stream, HEADER_SIZE)).version == Version(1, position + 1)
    assert harness.host.pushes == 1
    return stream, wire


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


# What the server receives instead of the right frame, made from it and its neighbours.
WRONG_FRAMES: dict[str, Callable[[bytes, bytes, bytes], bytes]] = {
    "first byte of the tag": lambda before, right, after: flipped(right, HEADER_SIZE),
    "last byte of the tag": lambda before, right, after: flipped(right, HEADER_SIZE + TAG_SIZE - 1),
    "first value": lambda before, right, after: flipped(right, HEADER_SIZE + TAG_SIZE),
    "last value": lambda before, right, after: flipped(right, len(right) - 1),
    "another header": lambda before, right, after: after[:HEADER_SIZE] + right[HEADER_SIZE:],
    "another tag": lambda before, right, after: right[:HEADER_SIZE] + after[HEADER_SIZE:],
    "no tag": lambda before, right, after: right[:HEADER_SIZE] + bytes(TAG_SIZE) + right[HEADER_SIZE + TAG_SIZE :],
    "repeated": lambda before, right, after: before,
    "left out": lambda before, right, after: after,
}


@pytest.mark.parametrize("name", WRONG_FRAMES)
def test_a_frame_with_a_wrong_tag_changes_nothing_and_closes_the_connection(harnesses: Harnesses, name: str) -> None:
    harness = harnesses()
    stream, before = joined(harness)
    right, after = (stream.tagged(push_frame(harness, position)) for position in (GOOD, GOOD + 1))
    weights = harness.published.values.tobytes()
    stream.send_wire(WRONG_FRAMES[name](before, right, after))
    assert closed(stream)
    harness.log.wait(WRONG)
    assert harness.log.count("was closed") == 1
    assert harness.server.version == Version(1, GOOD)
    assert harness.settled() == GOOD
    assert harness.published.values.tobytes() == weights
    assert harness.host.pushes == 1, "it reached no server"


@pytest.mark.parametrize("place", range(0, HEADER_SIZE, 5))
def test_a_bit_that_changed_in_the_header_closes_the_connection(harnesses: Harnesses, place: int) -> None:
    harness = harnesses()
    stream, _ = joined(harness)
    stream.send_wire(flipped(stream.tagged(push_frame(harness, GOOD)), place))
    assert closed(stream)
    harness.log.wait("the connection of by-hand was closed: (a frame begins with|the checksum of a frame's header)")
    assert harness.server.version == Version(1, GOOD)


def test_the_payload_of_a_header_that_announces_too_much_is_not_received(harnesses: Harnesses) -> None:
    """A header that nobody has authenticated yet cannot choose how much memory is written."""
    harness = harnesses()
    stream, _ = joined(harness)
    size = harness.push_format.sizes(shared=False)[0]
    long = header(harness, batch=batch(GOOD), payload=size + 4, number=GOOD + 1).pack()
    stream.sendall(long + bytes(size + 4))
    assert closed(stream)
    harness.log.wait(f"the connection of by-hand was closed: a push has {size + 4} bytes of payload")
    assert harness.server.version == Version(1, GOOD)


@pytest.mark.parametrize("place", [0, PIECE - 1, PIECE, -1])
def test_a_payload_of_several_pieces_is_checked_as_a_whole(harnesses: Harnesses, place: int) -> None:
    harness = harnesses(**BIG)
    stream, _ = joined(harness)
    wire = stream.tagged(push_frame(harness, GOOD))
    assert len(wire) > 3 * PIECE
    with suppress(ConnectionError):
        stream.send_wire(flipped(wire, HEADER_SIZE + TAG_SIZE + place if place >= 0 else len(wire) - 1))
    assert closed(stream)
    harness.log.wait(WRONG)
    assert harness.server.version == Version(1, GOOD)


def test_every_context_of_libcrypto_is_freed_with_its_connection(
    harnesses: Harnesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    libcrypto = Libcrypto.find()
    assert libcrypto is not None
    contexts: list[int] = []  # that are not freed
    new: Any = libcrypto._new
    free: Any = libcrypto._free

    def counting_new() -> int:
        contexts.append(new())
        return contexts[-1]

    def counting_free(context: int) -> None:
        contexts.remove(context)
        free(context)

    monkeypatch.setattr(libcrypto, "_new", counting_new)
    monkeypatch.setattr(libcrypto, "_free", counting_free)
    monkeypatch.setattr(Libcrypto, "find", lambda: libcrypto)
    harness = harnesses()
    left, _ = joined(harness)
    assert len(contexts) == 2
    left.close()
    harness.listener.wait_until_all_left()
    assert contexts == []
    again = harness.shaken(TAGS)
    again.sendall(push_frame(harness, GOOD))
    exactly(again, HEADER_SIZE)
    assert len(contexts) == 2
    again.sendall(bytes(HEADER_SIZE))  # the server closes the connection
    assert closed(again)
    harness.listener.wait_until_all_left()
    assert contexts == []


def test_without_libcrypto_python_receives_and_compiled_code_applies(
    harnesses: Harnesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Libcrypto, "find", lambda: None)
    harness = harnesses()
    reference = harness.reference()
    client = harness.lane(TAGS, slots=1)
    harness.join("worker-0")
    reference.join("worker-0", 0.0)
    read = V1
    for position in range(5):
        gradient = client.gradient(0, batch(position), read, seed=position)
        receipt = client.lane.push(gradient, 0, wants=True).receipt(LIMIT_S)
        assert receipt == reference.push(gradient, now=1.0)[0]
        assert receipt.outcome is Outcome.APPLIED
        assert client.weights(0).tobytes() == reference.published.tobytes()
        read = receipt.version
    assert harness.host.pushes == 1, "the first push of the epoch"
