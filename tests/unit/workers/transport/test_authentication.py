from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from threading import Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psgd_workers.errors import FrameError, LaneError
from psgd_workers.messages import Outcome
from psgd_workers.transport import memory
from psgd_workers.transport.authentication import TAG_SIZE, FrameAuthenticator
from psgd_workers.transport.frames import HEADER_SIZE
from psgd_workers.transport.handshake import GREETING_SIZE, HELLO_SIZE, WELCOME_SIZE
from tests.support.server_harness import FIRST, LIMIT_S, SECOND, V1, Harnesses, ServerHarness

KEY = bytes(range(32))


# Tags


def test_a_tag_is_that_of_aes_gcm_without_text() -> None:
    """The tag of 32 zero bytes under NIST's test vector for AES-256-GCM without plaintext and additional data."""
    assert FrameAuthenticator(bytes(32)).tag([]).hex() == "530f8afbc74536b9a963b4f1c4cb738b"


@given(st.lists(st.binary(max_size=40), max_size=5))
def test_frames_in_their_order_pass(frames: list[bytes]) -> None:
    sender = FrameAuthenticator(KEY)
    receiver = FrameAuthenticator(KEY)
    for frame in frames:
        receiver.check(sender.tag([frame[:7], memoryview(frame)[7:]]), [memoryview(frame)])


@pytest.mark.parametrize(
    ("passed", "frame"),
    [
        ([b"a"], b"a"),  # repeated
        ([], b"b"),  # the first was left out
        ([], b"c"),  # changed
        ([], b"a\0"),  # longer
        ([], b""),  # shorter
    ],
)
def test_a_frame_that_was_not_sent_next_is_refused(passed: list[bytes], frame: bytes) -> None:
    sender = FrameAuthenticator(KEY)
    tags = {frame: sender.tag([frame]) for frame in (b"a", b"b")}
    receiver = FrameAuthenticator(KEY)
    for earlier in passed:
        receiver.check(tags[earlier], [earlier])
    with pytest.raises(FrameError, match="a frame was changed, repeated or left out on its way: its tag is wrong"):
        receiver.check(tags.get(frame, tags[b"a"]), [frame])


def test_another_key_makes_other_tags() -> None:
    with pytest.raises(FrameError):
        FrameAuthenticator(KEY).check(FrameAuthenticator(bytes(32)).tag([b"a"]), [b"a"])


# Lanes

needs_memory = pytest.mark.skipif(not memory.has_shared_memory(), reason="needs Linux' anonymous shared memory")
Change = Callable[[bytes], bytes]


class Relay:
    """A computer between worker and server, which relays the handshake and may change the bytes of a frame.

    Attributes:
        to_server: changes bytes on their way to the server.
        to_worker: changes bytes on their way to the worker.
    """

    def __init__(self, harness: ServerHarness) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._server = harness.unconnected("tcp")
        self._harness = harness
        self.to_server: Change = bytes
        self.to_worker: Change = bytes
        self._threads = [Thread(target=self._relay, daemon=True)]
        self._threads[0].start()

    def _relay(self) -> None:
        worker = self._listening.accept()[0]
        with worker:
            self._harness.connect(self._server)
            with ThreadPoolExecutor(2) as pool:
                pool.submit(self._pump, worker, self._server, HELLO_SIZE, lambda data: self.to_server(data))
                pool.submit(self._pump, self._server, worker, GREETING_SIZE + WELCOME_SIZE, lambda d: self.to_worker(d))

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket, handshake: int, change: Change) -> None:
        passed = 0
        with suppress(OSError):
            while data := source.recv(2**16):
                target.sendall(data if passed < handshake else change(data))
                passed += len(data)
        for stream in (source, target):
            with suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listening.close()
        self._threads[0].join(LIMIT_S)
        assert not self._threads[0].is_alive()


@contextmanager
def relayed(harness: ServerHarness) -> Iterator[Relay]:
    relay = Relay(harness)
    harness.address = harness.address._replace(port=relay.port)
    try:
        yield relay
    finally:
        relay.close()


def flipped(position: int) -> Change:
    def change(data: bytes) -> bytes:
        return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]

    return change


@needs_memory
def test_pushes_that_nobody_changes_are_applied(harnesses: Harnesses) -> None:
    harness = harnesses(authenticates=True)
    with relayed(harness):
        worker = harness.lane("tcp")
        version = worker.lane.pull(0, LIMIT_S)
        for batch in (FIRST, SECOND):
            receipt = worker.lane.push(worker.gradient(0, batch, version), 0, wants=True).receipt(LIMIT_S)
            assert receipt.outcome is Outcome.APPLIED
            assert worker.weights(0).tobytes() == harness.published.values.tobytes()
            version = receipt.version
        worker.lane.close()


@needs_memory
@pytest.mark.parametrize("position", [HEADER_SIZE, HEADER_SIZE + TAG_SIZE, HEADER_SIZE + TAG_SIZE + 100])
def test_a_gradient_that_was_changed_on_its_way_is_not_applied(harnesses: Harnesses, position: int) -> None:
    harness = harnesses(authenticates=True)
    with relayed(harness) as relay:
        worker = harness.lane("tcp")
        relay.to_server = flipped(position)
        with pytest.raises(LaneError):
            worker.lane.push(worker.gradient(0, FIRST, V1), 0, wants=True).receipt(LIMIT_S)
        harness.log.wait("a frame was changed, repeated or left out on its way: its tag is wrong")
        assert harness.untouched()
        worker.lane.close()


@needs_memory
def test_weights_that_were_changed_on_their_way_are_not_used(harnesses: Harnesses) -> None:
    harness = harnesses(authenticates=True)
    with relayed(harness) as relay:
        worker = harness.lane("tcp")
        relay.to_worker = flipped(HEADER_SIZE + TAG_SIZE + 8)
        with pytest.raises(FrameError, match="its tag is wrong"):
            worker.lane.pull(0, LIMIT_S)
        worker.lane.close()


@needs_memory
def test_without_tags_a_changed_gradient_is_applied(harnesses: Harnesses) -> None:
    """This is why tags are on by default."""
    harness = harnesses(authenticates=False)
    with relayed(harness) as relay:
        worker = harness.lane("tcp")
        relay.to_server = flipped(HEADER_SIZE + 100)
        receipt = worker.lane.push(worker.gradient(0, FIRST, V1), 0, wants=False).receipt(LIMIT_S)
        assert receipt.outcome is Outcome.APPLIED
        worker.lane.close()
