"""A server with its listener, and its connections in tests: lanes, and sockets that a test uses by hand."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Condition, Semaphore
from typing import Any, Literal

import numpy as np

from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.partitions import Partition
from psgd.core.server.report import Report
from psgd.serving import limited_log
from psgd.serving.compiled.loading import SWITCH
from psgd.serving.host import Reply, ServerHost
from psgd.serving.listener import Listener
from psgd.serving.turns import take_short_turns
from psgd.spec import JobSpec
from psgd_workers.gradients.sender import Sender, gradient_norm
from psgd_workers.messages import BatchId, EpochGrid, FloatArray, Gradient, Outcome, Receipt, Version
from psgd_workers.transport.frames import Frame, FrameKind, PushFormat
from psgd_workers.transport.handshake import GREETING_SIZE, WELCOME_SIZE, Address, Greeting, Hello
from psgd_workers.transport.memory import PublishedVector, Segment
from psgd_workers.transport.shm import ShmLane
from psgd_workers.transport.tcp import TcpLane
from tests.support.tagged_socket import TaggedSocket

__all__ = [
    "BIG",
    "DC_ASGD",
    "FIRST",
    "INT8",
    "IS_COMPILED",
    "LANE_CASES",
    "LIMIT_S",
    "NUM_PARAMETERS",
    "PART",
    "PULL",
    "SECOND",
    "V1",
    "Harnesses",
    "LaneCase",
    "ServerHarness",
    "WorkerHarness",
    "batch",
    "closed",
    "exactly",
    "header",
    "open_files",
    "push_frame",
    "randoms",
    "works",
]

# A lane's kind. "compiled": the server has its compiled push path. "with tags": frames are authenticated.
LaneCase = Literal["shm", "tcp", "tcp with tags", "compiled shm", "compiled tcp", "compiled tcp with tags"]
IS_COMPILED = os.environ.get(SWITCH) != "0"
LANE_CASES: list[LaneCase] = ["shm", "tcp", "tcp with tags"]
if IS_COMPILED:
    LANE_CASES += ["compiled shm", "compiled tcp", "compiled tcp with tags"]
LIMIT_S = 10.0  # seconds to wait for events that take almost no time
NUM_PARAMETERS = 90
PART = Partition(0, 8, 75, 60)  # odd sizes, with 7 buffers at the end
V1 = Version(1, 0)
FIRST = BatchId(0, 0, 0)
SECOND = BatchId(0, 0, 1)
GRID = EpochGrid((50, 40), 900)
DC_ASGD = {"correction": {"name": "dc_asgd"}}
INT8 = {"compression": {"name": "int8"}}
PULL = Frame(FrameKind.PULL, 0, 0, True, 1, 0)
BIG = {"partition": Partition(0, 0, 4_000_000, 4_000_000), "num_parameters": 4_000_000}  # more than sockets buffer

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
    """Collects the log lines of the server's connections."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._new_line = Condition()

    def emit(self, record: logging.LogRecord) -> None:
        with self._new_line:
            self.lines.append(record.getMessage())
            self._new_line.notify_all()

    def wait(self, pattern: str, times: int = 1) -> None:
        """Wait until `times` lines match a pattern."""
        with self._new_line:
            found = self._new_line.wait_for(lambda: self.count(pattern) >= times, LIMIT_S)
        assert found, f"no {pattern!r} in {self.lines}"

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, line) is not None for line in self.lines)


class _Listener(Listener):
    """Lets a test wait until connections are closed."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._stream_closed = Condition()

    def _forget(self, stream: socket.socket) -> None:
        super()._forget(stream)
        with self._stream_closed:
            self._stream_closed.notify_all()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds, which is tested whenever a connection was closed."""
        with self._stream_closed:
            assert self._stream_closed.wait_for(condition, LIMIT_S)

    def wait_until_all_left(self) -> None:
        self.wait_until(lambda: not self._streams)


class _Host(ServerHost):
    """Lets a test wait until pushes arrive."""

    def __init__(self, server: ParameterServer) -> None:
        super().__init__(server)
        self.arrived = Semaphore(0)
        self.pushes = 0  # that compiled code left to Python

    def push(self, gradient: Gradient, reply: Reply) -> None:
        self.pushes += 1
        super().push(gradient, reply)
        self.arrived.release()


class ServerHarness:
    """A server, its listener, and the lanes and sockets that a test connects to it.

    Args:
        spec: the job.
        partition: partition of the server.
        num_parameters: values of the whole weights.
        tcp: True to listen on the network.
        unix: True to listen on a Unix socket.
        authenticates: True if frames on the network have tags, as they have from the first lane "with tags" on.
    """

    def __init__(
        self,
        spec: JobSpec,
        partition: Partition = PART,
        num_parameters: int = NUM_PARAMETERS,
        tcp: bool = True,
        unix: bool = True,
        authenticates: bool = False,
    ) -> None:
        self.spec = spec
        self.partition = partition
        self.num_parameters = num_parameters
        self.part = slice(partition.start, partition.stop)
        self.size = partition.stop - partition.start
        self.weights = randoms(0, num_parameters)[self.part]
        self.published = PublishedVector(self.size)
        self.log = Log()
        self.errors: list[threading.ExceptHookArgs] = []  # that were not caught in their threads
        self._lanes: list[Lane] = []
        self._sockets: list[socket.socket] = []
        self._segment = Segment(num_parameters, 2)  # memory for sockets that a test uses by hand
        self._max_lines = limited_log.MAX_LINES
        self._turn_s = sys.getswitchinterval()
        take_short_turns()  # as in a server's process
        limited_log.MAX_LINES = sys.maxsize  # tests wait for lines, also for the last of many
        self._excepthook = threading.excepthook
        threading.excepthook = self.errors.append
        logging.getLogger("psgd.lanes").addHandler(self.log)
        encoding = "" if spec.compression.name == "none" else spec.compression.name
        sends_weights = spec.worker_options.sends_weights
        self.push_format = PushFormat(
            self.size, partition.num_trainable, encoding, sends_weights, authenticates=authenticates
        )
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
        """Return an equal server that a test calls directly."""
        return ParameterServer(self.spec, self.partition, self.weights, GRID, V1, published)

    def report(self) -> Report:
        """Return the server's report."""
        with self.host._server_lock:
            return self.server.report()

    def join(self, *workers: str) -> None:
        for worker in workers:
            self.host.join(worker)

    def arrived(self, pushes: int = 1) -> None:
        """Wait until that many more pushes have arrived."""
        for _ in range(pushes):
            assert self.host.arrived.acquire(timeout=LIMIT_S), "no push arrived"

    def streams(self) -> list[socket.socket]:
        """Return the server's sockets to its workers."""
        return list(self.listener._streams)

    def untouched(self) -> bool:
        """Return True if no push was ever applied."""
        return self.server.version == V1 and not self.settled() and self._unchanged()

    def settled(self) -> int:
        """Return the number of batches that the server has settled."""
        report = self.report()
        return sum(int(bitmap.sum()) for bitmap in report.settled.values()) + 90 * report.epochs

    def _unchanged(self) -> bool:
        return bool(self.published.values.tobytes() == self.weights.tobytes())

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Let the server do nothing meanwhile."""
        with self.host._server_lock:
            yield

    def lane(
        self,
        kind: LaneCase,
        worker: str = "worker-0",
        slots: int = 3,
        address: Address | None = None,
        timeout_s: float = LIMIT_S,
    ) -> WorkerHarness:
        """Connect a worker."""
        segment = Segment(self.num_parameters, slots)
        lane_class: type[Lane] = TcpLane if "tcp" in kind else ShmLane
        self._prepare(kind)
        try:
            lane = lane_class(worker, segment, self.part, self.push_format, address or self.address, timeout_s)
        finally:
            segment.close()
        self._lanes.append(lane)
        return WorkerHarness(self, worker, segment, lane)

    def _prepare(self, kind: LaneCase) -> None:
        """Give the server its compiled push path, and the frames their tags, if the kind of lane says so."""
        if kind.endswith("with tags"):
            self.push_format = self.listener._push_format = self.push_format._replace(authenticates=True)
        if kind.startswith("compiled") and self.host.compiled is None:
            self.host.compile()
            assert self.host.compiled is not None

    def forget(self, client: WorkerHarness) -> None:
        """Do not close a worker's lane again at the end."""
        self._lanes.remove(client.lane)

    def unconnected(self, kind: LaneCase) -> socket.socket:
        """Return a socket that is not connected yet."""
        of_kind = TaggedSocket if kind.endswith("with tags") else socket.socket
        stream = of_kind(socket.AF_INET if "tcp" in kind else socket.AF_UNIX, socket.SOCK_STREAM)
        self._prepare(kind)
        self._sockets.append(stream)
        stream.settimeout(LIMIT_S)
        return stream

    def connect(self, stream: socket.socket) -> None:
        of_unix = stream.family == socket.AF_UNIX
        stream.connect(f"\0{self.listener.path}" if of_unix else ("127.0.0.1", self.listener.port))

    def connected(self, kind: LaneCase) -> socket.socket:
        """Return a connected socket on which nothing was sent yet."""
        stream = self.unconnected(kind)
        self.connect(stream)
        return stream

    def hello(self, kind: LaneCase, **changes: Any) -> Hello:
        hello = Hello.new(1, self.num_parameters, 2, "tcp" not in kind, "by-hand")
        return hello._replace(**changes)

    def greeted(self, kind: LaneCase, **changes: Any) -> socket.socket:
        """Return a connected socket on which a hello with these changes was sent."""
        stream = self.connected(kind)
        self.greet(stream, kind, **changes)
        return stream

    def greet(self, stream: socket.socket, kind: LaneCase, **changes: Any) -> None:
        greeting = Greeting.unpack(exactly(stream, GREETING_SIZE))
        hello = self.hello(kind, **changes)
        stream.sendall(hello.pack(self.listener.key, greeting))
        if isinstance(stream, TaggedSocket):
            stream.keys = hello.frame_keys(self.listener.key, greeting)

    def shaken(self, kind: LaneCase) -> socket.socket:
        """Return a connected socket on which frames may be sent."""
        (stream,) = self.all_shaken(kind, 1)
        return stream

    def all_shaken(self, kind: LaneCase, count: int) -> list[socket.socket]:
        """Return `count` connections whose handshakes ran at the same time."""
        streams = [self.connected(kind) for _ in range(count)]
        for stream in streams:
            self.greet(stream, kind)
        for stream in streams:
            self.finish(stream, kind)
        if "tcp" not in kind:
            assert [stream.recv(1) for stream in streams] == [b"\0"] * count
        return streams

    def finish(self, stream: socket.socket, kind: LaneCase) -> None:
        """Finish a handshake after the hello."""
        if "tcp" in kind:
            exactly(stream, WELCOME_SIZE)
            if isinstance(stream, TaggedSocket):
                stream.begin()
            return
        assert self._segment.file is not None
        _, (file,), _, _ = socket.recv_fds(stream, WELCOME_SIZE, 1)
        os.close(file)
        socket.send_fds(stream, [b"\0"], [self._segment.file])

    def close(self) -> None:
        """Close everything, and check that the server forgets all connections in time."""
        for lane in self._lanes:
            lane.close()
        for stream in self._sockets:
            stream.close()
        self.listener.close()
        self.listener.wait_until_all_left()
        limited_log.MAX_LINES = self._max_lines
        sys.setswitchinterval(self._turn_s)
        threading.excepthook = self._excepthook
        self.published.close()
        self._segment.close()
        logging.getLogger("psgd.lanes").removeHandler(self.log)


class WorkerHarness:
    """A worker: its lane, its memory, and gradients made as `Worker` makes them."""

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
        """Return the partition's weights in a slot."""
        return self.segment.slots[slot].weights[self._harness.part]

    def gradient(self, slot: int, batch: BatchId, read: Version, seed: int = 1) -> Gradient:
        weights, values = self.segment.slots[slot]
        values[:] = randoms(seed, len(values))
        sender = self._senders[slot]
        norm = gradient_norm(values, self._trainable)
        _, gradient, _ = sender.gradients(batch, 10, [read] * 3, values, weights, 0.5, norm, 0.01)
        sender.settle([])
        return gradient._replace(others=())  # the harness has only one of the three partitions


def header(harness: ServerHarness, **changes: Any) -> Frame:
    """Return the header of a push that the server would accept, but with these changes."""
    size = harness.push_format.sizes(shared=False)[-1]
    frame = Frame(FrameKind.PUSH, 0, 0, False, 1, size, FIRST, 10, V1, 0.5, 1.0, 0.01, number=1)
    return frame._replace(**changes)


def push_frame(harness: ServerHarness, position: int) -> bytes:
    """Return the frame of a push that the server would apply over the network, without its tag."""
    size = harness.push_format.sizes(shared=False)[0]
    return header(harness, batch=batch(position), payload=size, number=position + 1).pack() + bytes(size)


def closed(stream: socket.socket) -> bool:
    """Return True if the other end closes the connection in time, whatever it sends before."""
    with suppress(ConnectionResetError, BrokenPipeError):
        while stream.recv(2**20):
            pass
    return True


def batch(position: int) -> BatchId:
    return GRID.batch(0, position)


def works(harness: ServerHarness, position: int = 0, kind: LaneCase = "shm") -> None:
    """Check that a new worker can connect and that its push is applied."""
    client = harness.lane(kind, "worker-7")
    read = client.lane.pull(0, LIMIT_S)
    receipt = client.lane.push(client.gradient(0, batch(position), read), 0, wants=True).receipt(LIMIT_S)
    assert receipt == Receipt("worker-7", batch(position), Outcome.APPLIED, Version(1, read.updates + 1))
    assert client.weights(0).tobytes() == harness.published.values.tobytes()


def open_files() -> set[tuple[int, int]]:
    """Return the open files of this process as (device, inode)."""
    found = set()
    for file in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208
        with suppress(OSError):  # the descriptor of the listing itself
            status = os.fstat(file)
            found.add((status.st_dev, status.st_ino))
    return found
