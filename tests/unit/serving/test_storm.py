"""Storms of damaged frames from a process that has the run's key, beside a worker that trains."""

from __future__ import annotations

import logging
import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from math import nan
from multiprocessing import get_context
from pathlib import Path
from threading import Event, Thread
from typing import Any
from zlib import crc32

import numpy as np
import pytest

from psgd_workers.messages import Outcome, Version
from psgd_workers.transport import memory
from psgd_workers.transport.frames import HEADER_SIZE, Frame, FrameKind, PushFormat
from psgd_workers.transport.handshake import GREETING_SIZE, WELCOME_SIZE, Address, Greeting, Hello
from psgd_workers.transport.memory import Segment
from tests.support.server_harness import (
    FIRST,
    INT8,
    LANE_CASES,
    LIMIT_S,
    NUM_PARAMETERS,
    Harnesses,
    LaneCase,
    ServerHarness,
    batch,
    exactly,
)
from tests.support.tagged_socket import TaggedSocket

if not memory.has_shared_memory():
    pytest.skip("needs Linux' anonymous shared memory", allow_module_level=True)

log = logging.getLogger("tests.storm")

SPAWN = get_context("spawn")
BATCHES = 90
CONNECTIONS = 8
LATENCY_S = 0.1
GROWTH = 50 * 2**20  # bytes by which the server's process may grow


def attack(kind: LaneCase, address: Address, push_format: PushFormat, frames: int, seed: int) -> None:
    """Send damaged frames over connections with a valid handshake, and open a new one for each that is closed."""
    rng = np.random.default_rng(seed)
    segment = Segment(NUM_PARAMETERS, 2)
    opened = [shaken(kind, address, segment) for _ in range(CONNECTIONS)]
    for number in range(frames):
        place = number % CONNECTIONS
        frame = damaged(rng, push_format, "tcp" not in kind)
        stream = opened[place]
        try:
            if isinstance(stream, TaggedSocket) and rng.random() < 0.1:  # damaged after its tag was made
                stream.send_wire(flipped(rng, stream.tagged(frame)))
            else:
                stream.sendall(frame)
        except OSError:
            opened[place].close()
            opened[place] = shaken(kind, address, segment)
    for stream in opened:
        stream.close()
    segment.close()


def shaken(kind: LaneCase, address: Address, segment: Segment) -> socket.socket:
    """Return a connection with a valid handshake."""
    family = socket.AF_INET if "tcp" in kind else socket.AF_UNIX
    stream = (TaggedSocket if "tags" in kind else socket.socket)(family, socket.SOCK_STREAM)
    stream.settimeout(LIMIT_S)
    stream.connect((address.host, address.port) if "tcp" in kind else f"\0{address.path}")
    greeting = Greeting.unpack(exactly(stream, GREETING_SIZE))
    hello = Hello.new(address.incarnation, NUM_PARAMETERS, 2, "tcp" not in kind, "attacker")
    stream.sendall(hello.pack(address.key, greeting))
    if "tcp" in kind:
        exactly(stream, WELCOME_SIZE)
        if isinstance(stream, TaggedSocket):
            stream.keys = hello.frame_keys(address.key, greeting)
            stream.begin()
        return stream
    assert segment.file is not None
    _, (file,), _, _ = socket.recv_fds(stream, WELCOME_SIZE, 1)
    os.close(file)
    socket.send_fds(stream, [b"\0"], [segment.file])
    stream.recv(1)
    return stream


def flipped(rng: np.random.Generator, data: bytes | bytearray) -> bytes:
    """Return the data with one bit changed."""
    place = int(rng.integers(len(data)))
    return bytes([*data[:place], data[place] ^ 1 << int(rng.integers(8)), *data[place + 1 :]])


def damaged(rng: np.random.Generator, push_format: PushFormat, shared: bool) -> bytes:
    """Return a frame with changed bytes; in half of them the checksum is right. Undamaged, it would be rejected."""
    sizes = push_format.sizes(shared)
    size = int(rng.integers(sizes.start, sizes.stop))
    code = 4 if push_format.encoding else 0
    kinds = (FrameKind.PUSH, FrameKind.PUSH, FrameKind.PULL, FrameKind.ASK)
    kind = kinds[int(rng.integers(len(kinds)))]
    payload = size if kind is FrameKind.PUSH else 0
    frame = Frame(kind, 0, code, False, 1, payload, FIRST, 10, Version(99, 9), 0.5, nan, 0.01, number=1)
    header = bytearray(frame.pack())
    for _ in range(int(rng.integers(0, 4))):
        header[:] = flipped(rng, header)
    if rng.random() < 0.5:
        header[HEADER_SIZE - 4 :] = struct.pack("<I", crc32(header[: HEADER_SIZE - 4]))
    return bytes(header) + rng.bytes(frame.payload)


class GoodWorker:
    """A worker that pushes until it is stopped, and notes its longest wait for a receipt."""

    def __init__(self, harness: ServerHarness, kind: LaneCase) -> None:
        self._client = harness.lane(kind)
        harness.join(self._client.worker)  # so that compiled code takes its pushes
        self._stop = Event()
        self._has_pushed = Event()
        self.pushes = 0
        self.longest_s = 0.0
        self.outcomes: set[Outcome] = set()
        self._thread = Thread(target=self._push)
        self._thread.start()

    def _push(self) -> None:
        version = Version(1, 0)
        while not self._stop.is_set():
            gradient = self._client.gradient(0, batch(self.pushes % BATCHES), version)
            gradient = gradient._replace(batch=gradient.batch._replace(epoch=self.pushes // BATCHES))
            began = time.monotonic()
            receipt = self._client.lane.push(gradient, 0, wants=True).receipt(LIMIT_S)
            self.longest_s = max(self.longest_s, time.monotonic() - began)
            self.outcomes.add(receipt.outcome)
            version = receipt.version
            self.pushes += 1
            if self.pushes == 10:
                self._has_pushed.set()

    def wait(self) -> None:
        """Wait until it has pushed some gradients."""
        assert self._has_pushed.wait(LIMIT_S)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive()


def resident() -> int:
    """Return the bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


@pytest.fixture
def storms() -> Iterator[list[Any]]:
    processes: list[Any] = []
    yield processes
    for process in processes:
        with suppress(ValueError):
            process.kill()
            process.join(LIMIT_S)


@pytest.mark.parametrize("sections", [{}, INT8], ids=["plain", "compressed"])
@pytest.mark.parametrize("kind", LANE_CASES)
@pytest.mark.parametrize(
    "frames",
    [600, pytest.param(34_000, marks=[pytest.mark.chaos, pytest.mark.timeout(900)])],  # 272,000 over all cases
)
def test_a_storm_of_damaged_frames_stops_no_worker(
    harnesses: Harnesses, storms: list[Any], kind: LaneCase, sections: Any, frames: int
) -> None:
    harness = harnesses(sections=sections)
    worker = GoodWorker(harness, kind)
    worker.wait()
    before = resident()
    storms.append(SPAWN.Process(target=attack, args=(kind, harness.address, harness.push_format, frames, 0)))
    storms[0].start()
    storms[0].join(600)
    assert storms[0].exitcode == 0
    worker.stop()
    report = harness.report()
    assert worker.outcomes == {Outcome.APPLIED}
    assert report.pushes["applied"] == worker.pushes > 10
    assert harness.server.version.updates == worker.pushes
    assert np.isfinite(harness.published.values).all()
    grown = resident() - before
    log.info("%s frames on %s: longest wait %.0f ms, grown by %s bytes", frames, kind, 1e3 * worker.longest_s, grown)
    if frames > 10_000:
        assert grown < GROWTH
        assert worker.longest_s < LATENCY_S
