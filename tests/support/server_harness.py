"""A server with its listener, and what tests reach it by: lanes, and sockets by hand."""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Condition, Semaphore
from typing import Any, Literal

import numpy as np

from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.partitions import Partition
from psgd.core.server.report import Report
from psgd.serving.host import Reply, ServerHost
from psgd.serving.listener import Listener
from psgd.spec import JobSpec
from psgd_workers.gradients.sender import Sender, gradient_norm
from psgd_workers.messages import BatchId, EpochGrid, FloatArray, Gradient, Outcome, Receipt, Version
from psgd_workers.transport import frames
from psgd_workers.transport.frames import Frame, FrameKind, PushFormat
from psgd_workers.transport.handshake import GREETING_SIZE, WELCOME_SIZE, Address, Greeting, Hello
from psgd_workers.transport.memory import PublishedVector, Segment
from psgd_workers.transport.shm import ShmLane
from psgd_workers.transport.tcp import TcpLane

__all__ = [
    "BIG",
    "DC_ASGD",
    "FIRST",
    "INT8",
    "KINDS",
    "LIMIT_S",
    "NUM_PARAMETERS",
    "PART",
    "PULL",
    "SECOND",
    "V1",
    "Harnesses",
    "Kinds",
    "ServerHarness",
    "WorkerHarness",
    "batch",
    "closed",
    "exactly",
    "header",
    "open_files",
    "randoms",
    "works",
]

Kinds = Literal["shm", "crowd", "tcp"]  # crowd: the shm lane to a small partition
KINDS: list[Kinds] = ["shm", "crowd", "tcp"]
LIMIT_S = 10.0  # for what takes no time
NUM_PARAMETERS = 90
PART = Partition(0, 8, 75, 60)  # odd sizes, and 7 buffers at the end
V1 = Version(1, 0)
FIRST = BatchId(0, 0, 0)
SECOND = BatchId(0, 0, 1)
GRID = EpochGrid((50, 40), 900)
DC_ASGD = {"correction": {"name": "dc_asgd"}}
INT8 = {"compression": {"name": "int8"}}
PULL = Frame(FrameKind.PULL, 0, 0, True, 1, 0)
BIG = {"partition": Partition(0, 0, 4_000_000, 4_000_000), "num_parameters": 4_000_000}  # more than sockets hold

Lane = ShmLane | TcpLane
Harnesses = Callable[..., "ServerHarness"]


def randoms(seed: int, size: int = NUM_PARAMETERS) -> FloatArray:
    return np.random.default_rng(seed).standard_normal(size, dtype=np.float32)


def exactly(stream: socket.socket, size: int) -> bytes:
    """Receive `size` bytes; fewer if the other end closes the connection."""
    data = bytearray()
    while len(data) < size and (more := stream.recv(size - len(data))):
        data += more
    return bytes(data)


class Log(logging.Handler):
    """The log lines of the listener."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._news = Condition()

    def emit(self, record: logging.LogRecord) -> None:
        with self._news:
            self.lines.append(record.getMessage())
            self._news.notify_all()

    def wait(self, pattern: str, times: int = 1) -> None:
        with self._news:
            found = self._news.wait_for(lambda: self.count(pattern) >= times, LIMIT_S)
        assert found, f"no {pattern!r} in {self.lines}"

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, line) is not None for line in self.lines)


class _Listener(Listener):
    """Lets a test wait until nobody is served who has hung up."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._left = Condition()

    def _forget(self, stream: socket.socket) -> None:
        super()._forget(stream)
        with self._left:
            self._left.notify_all()

    def all_gone(self) -> None:
        with self._left:
            assert self._left.wait_for(lambda: not self._streams, LIMIT_S)


class _Host(ServerHost):
    """Lets a test wait for pushes that arrive."""

    def __init__(self, server: ParameterServer) -> None:
        super().__init__(server)
        self.arrived = Semaphore(0)

    def push(self, gradient: Gradient, reply: Reply) -> None:
        super().push(gradient, reply)
        self.arrived.release()


class ServerHarness:
    """The server's side.

    Args:
        spec: the job.
        partition: the server's.
        num_parameters: of the whole weights.
        tcp, unix: where to listen.
    """

    def __init__(
        self,
        spec: JobSpec,
        partition: Partition = PART,
        num_parameters: int = NUM_PARAMETERS,
        tcp: bool = True,
        unix: bool = True,
    ) -> None:
        self.spec = spec
        self.partition = partition
        self.num_parameters = num_parameters
        self.part = slice(partition.start, partition.stop)
        self.size = partition.stop - partition.start
        self.weights = randoms(0, num_parameters)[self.part]
        self.published = PublishedVector(self.size)
        self.log = Log()
        self.errors: list[threading.ExceptHookArgs] = []  # that nobody handled
        self._lanes: list[Lane] = []
        self._sockets: list[socket.socket] = []
        self._segment = Segment(num_parameters, 2)  # of sockets by hand
        self._small = frames.SMALL
        self._policy = os.sched_getscheduler(0)
        self._excepthook, threading.excepthook = threading.excepthook, self.errors.append
        logging.getLogger("psgd.lanes").addHandler(self.log)
        encoding = "" if spec.compression.name == "none" else spec.compression.name
        self.push_format = PushFormat(self.size, partition.num_trainable, encoding, spec.worker_options.sends_weights)
        self.server = self.reference(self.published)
        self.host = _Host(self.server)
        self.listener = self.listen(tcp, unix)
        self.address = self.listener.address("node", "127.0.0.1")

    def listen(self, tcp: bool = True, unix: bool = True, ports: tuple[int, int] | None = None) -> _Listener:
        listener = _Listener(self.host, self.push_format, self.num_parameters, self.part, self.published)
        if unix:
            listener.listen_unix()
        if tcp:
            listener.listen_tcp("127.0.0.1", ports)
        return listener

    def reference(self, published: PublishedVector | None = None) -> ParameterServer:
        """The same server, to be called directly."""
        return ParameterServer(self.spec, self.partition, self.weights, GRID, V1, published)

    def report(self) -> Report:
        """Return the server's report."""
        with self.host._lock_server:
            return self.server.report()

    def join(self, *workers: str) -> None:
        for worker in workers:
            self.host.join(worker)

    def arrived(self, pushes: int = 1) -> None:
        """Wait until the server has them."""
        for _ in range(pushes):
            assert self.host.arrived.acquire(timeout=LIMIT_S), "no push arrived"

    def streams(self) -> list[socket.socket]:
        """The server's ends of its workers' connections."""
        return list(self.listener._streams)

    def untouched(self) -> bool:
        """Return True if no push was ever applied."""
        return self.server.version == V1 and not self.settled() and self._unchanged()

    def settled(self) -> int:
        report = self.report()
        return sum(int(bitmap.sum()) for bitmap in report.settled.values()) + 90 * report.epochs

    def _unchanged(self) -> bool:
        return bool(self.published.values.tobytes() == self.weights.tobytes())

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """The server does nothing meanwhile."""
        with self.host._lock_server:
            yield

    def lane(
        self,
        kind: Kinds,
        worker: str = "worker-0",
        slots: int = 3,
        address: Address | None = None,
        timeout_s: float = LIMIT_S,
    ) -> WorkerHarness:
        segment = Segment(self.num_parameters, slots)
        lane_class: type[Lane] = TcpLane if kind == "tcp" else ShmLane
        self._choose(kind)
        try:
            lane = lane_class(worker, segment, self.part, self.push_format, address or self.address, timeout_s)
        finally:
            segment.close()
        self._lanes.append(lane)
        return WorkerHarness(self, worker, segment, lane)

    def _choose(self, kind: Kinds) -> None:
        """Choose the server of the next connections: a thread for each, or the shared poller."""
        frames.SMALL = self._small if kind == "crowd" else 0

    def forget(self, client: WorkerHarness) -> None:
        """Its lane is closed."""
        self._lanes.remove(client.lane)

    def unconnected(self, kind: Kinds) -> socket.socket:
        """A socket that is to be connected."""
        stream = socket.socket(socket.AF_INET if kind == "tcp" else socket.AF_UNIX, socket.SOCK_STREAM)
        self._choose(kind)
        self._sockets.append(stream)
        stream.settimeout(LIMIT_S)
        return stream

    def connect(self, stream: socket.socket) -> None:
        of_unix = stream.family == socket.AF_UNIX
        stream.connect(f"\0{self.listener.path}" if of_unix else ("127.0.0.1", self.listener.port))

    def connected(self, kind: Kinds) -> socket.socket:
        """A socket on which nothing was said yet."""
        stream = self.unconnected(kind)
        self.connect(stream)
        return stream

    def hello(self, kind: Kinds, **changes: Any) -> Hello:
        hello = Hello.new(1, self.num_parameters, 2, kind != "tcp", "by-hand")
        return hello._replace(**changes)

    def greeted(self, kind: Kinds, **changes: Any) -> socket.socket:
        """A socket on which a hello was sent, with these changes."""
        stream = self.connected(kind)
        self.greet(stream, kind, **changes)
        return stream

    def greet(self, stream: socket.socket, kind: Kinds, **changes: Any) -> None:
        greeting = Greeting.unpack(exactly(stream, GREETING_SIZE))
        stream.sendall(self.hello(kind, **changes).pack(self.listener.key, greeting))

    def shaken(self, kind: Kinds) -> socket.socket:
        """A socket on which frames may be sent."""
        (stream,) = self.all_shaken(kind, 1)
        return stream

    def all_shaken(self, kind: Kinds, count: int) -> list[socket.socket]:
        """Return `count` connections whose handshakes ran at the same time."""
        streams = [self.connected(kind) for _ in range(count)]
        for stream in streams:
            self.greet(stream, kind)
        for stream in streams:
            self.finish(stream, kind)
        if kind != "tcp":
            assert [stream.recv(1) for stream in streams] == [b"\0"] * count
        return streams

    def finish(self, stream: socket.socket, kind: Kinds) -> None:
        """Finish a handshake after the hello."""
        if kind == "tcp":
            exactly(stream, WELCOME_SIZE)
            return
        assert self._segment.file is not None
        _, (file,), _, _ = socket.recv_fds(stream, WELCOME_SIZE, 1)
        os.close(file)
        socket.send_fds(stream, [b"\0"], [self._segment.file])

    def close(self) -> None:
        """All of it, within the limit; nothing of the loop's may be left."""
        os.sched_setscheduler(0, self._policy, os.sched_param(0))  # a lane may have changed it
        for lane in self._lanes:
            lane.close()
        for stream in self._sockets:
            stream.close()
        self.listener.close()
        self.listener.all_gone()
        frames.SMALL = self._small
        threading.excepthook = self._excepthook
        self.published.close()
        self._segment.close()
        logging.getLogger("psgd.lanes").removeHandler(self.log)


class WorkerHarness:
    """A worker's side: its lane, its memory, and gradients made as `Worker` makes them."""

    def __init__(self, harness: ServerHarness, worker: str, segment: Segment, lane: Lane) -> None:
        self.worker = worker
        self.segment = segment
        self.lane = lane
        self._harness = harness
        trainable = harness.partition.start + harness.partition.num_trainable
        parts = [slice(0, harness.part.start), harness.part, slice(harness.part.stop, harness.num_parameters)]
        self._senders = [
            Sender(worker, slot, parts, trainable, harness.spec.worker_options) for slot in range(len(segment.slots))
        ]
        self._trainable = trainable

    def weights(self, slot: int) -> FloatArray:
        """The partition's, as they lie in the slot."""
        return self.segment.slots[slot].weights[self._harness.part]

    def gradient(self, slot: int, batch: BatchId, read: Version, seed: int = 1) -> Gradient:
        weights, values = self.segment.slots[slot]
        values[:] = randoms(seed, len(values))
        sender = self._senders[slot]
        norm = gradient_norm(values, self._trainable)
        _, gradient, _ = sender.gradients(batch, 10, [read] * 3, values, weights, 0.5, norm, 0.01)
        sender.settle([])
        return gradient._replace(others=())  # the stage has one partition, cut out of the weights for its odd sizes


def header(harness: ServerHarness, **changes: Any) -> Frame:
    """Of a push that is taken, but for the changes."""
    size = harness.push_format.sizes(shared=False)[-1]
    frame = Frame(FrameKind.PUSH, 0, 0, False, 1, size, FIRST, 10, V1, 0.5, 1.0, 0.01, number=1)
    return frame._replace(**changes)


def closed(stream: socket.socket) -> bool:
    """Return True if the other end closes the connection within the limit, whatever it sends before."""
    with suppress(ConnectionResetError, BrokenPipeError):
        while stream.recv(2**20):
            pass
    return True


def batch(position: int) -> BatchId:
    return GRID.batch(0, position)


def works(harness: ServerHarness, position: int = 0, kind: Kinds = "shm") -> None:
    """A worker comes, and its push is applied."""
    client = harness.lane(kind, "worker-7")
    read = client.lane.pull(0, LIMIT_S)
    receipt = client.lane.push(client.gradient(0, batch(position), read), 0, wants=True).receipt(LIMIT_S)
    assert receipt == Receipt("worker-7", batch(position), Outcome.APPLIED, Version(1, read.updates + 1))
    assert client.weights(0).tobytes() == harness.published.values.tobytes()


def open_files() -> set[tuple[int, int]]:
    """Return the open files of this process as (descriptor, inode)."""
    found = set()
    for file in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208
        with suppress(OSError):  # the listing's own
            status = os.fstat(file)
            found.add((status.st_dev, status.st_ino))
    return found
