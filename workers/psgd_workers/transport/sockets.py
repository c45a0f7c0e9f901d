"""The worker's end of the shm and tcp lanes.

Both speak frames over a socket. On the shm lane gradient and weights lie in shared memory, and a push is one small
message each way; on the tcp lane they travel in the frames, and threads of the lane send and receive them while the
worker computes.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock, Thread
from typing import NamedTuple, Self

from psgd_workers.errors import FrameError, LaneError, LaneTimeoutError, ServerGoneError, SharedMemoryError
from psgd_workers.messages import FloatArray, Gradient, Receipt, Version
from psgd_workers.transport.affinity import allowed_processors, current_processor, wake
from psgd_workers.transport.frames import HEADER_SIZE, Frame, FrameKind, PushFormat
from psgd_workers.transport.handshake import GREETING_SIZE, WELCOME_SIZE, Address, Greeting, Hello
from psgd_workers.transport.lane import LaneKind, Pending
from psgd_workers.transport.memory import PublishedVector, Segment, stores_are_ordered
from psgd_workers.transport.streams import limit, receive, send, shut

__all__ = ["ShmLane", "TcpLane"]

GONE = "the server is gone"
CLOSED = f"{GONE}: it closed the connection; its log says why"


class _Connection:
    """A socket to a server that has proved to be this run's.

    Args:
        stream: connected.
    """

    def __init__(self, stream: socket.socket) -> None:
        self.stream = stream
        self._header = memoryview(bytearray(HEADER_SIZE))
        self._limit_s: float | None = None

    @classmethod
    def unix(cls, path: str, timeout_s: float) -> Self:
        return cls._open(socket.AF_UNIX, "\0" + path, timeout_s)

    @classmethod
    def tcp(cls, host: str, port: int, timeout_s: float) -> Self:
        connection = cls._open(socket.AF_INET, (host, port), timeout_s)
        connection.stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    @classmethod
    def _open(cls, family: int, to: str | tuple[str, int], timeout_s: float) -> Self:
        try:
            stream = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:  # too many open files, say
            raise ServerGoneError(f"cannot reach the server at {to!r}: {error}") from error
        try:
            stream.settimeout(timeout_s)
            stream.connect(to)
            stream.settimeout(None)  # from here on `limit` sets limits
        except OSError as error:
            stream.close()
            raise ServerGoneError(f"cannot reach the server at {to!r}: {error}") from error
        connection = cls(stream)
        connection.limit(timeout_s)
        return connection

    def limit(self, timeout_s: float | None) -> None:
        """How long the next calls may wait; None: until the connection is closed."""
        if timeout_s != self._limit_s:
            limit(self.stream, timeout_s)
            self._limit_s = timeout_s

    def send(self, *parts: bytes | memoryview) -> None:
        """All of it."""
        try:
            send(self.stream, *parts)
        except BlockingIOError as error:
            raise LaneTimeoutError(f"the server took no message for {self._limit_s} s") from error
        except OSError as error:
            raise ServerGoneError(f"{GONE}: {error}") from error

    def receive(self, into: memoryview) -> None:
        """Fill it."""
        try:
            got = receive(self.stream, into)
        except BlockingIOError as error:
            raise LaneTimeoutError(f"no answer from the server within {self._limit_s} s") from error
        except OSError as error:
            raise ServerGoneError(f"{GONE}: {error}") from error
        if got < len(into):
            raise ServerGoneError(CLOSED)

    def exactly(self, size: int) -> bytes:
        data = bytearray(size)
        self.receive(memoryview(data))
        return bytes(data)

    def frame(self) -> Frame:
        """The next header."""
        self.receive(self._header)
        return Frame.unpack(self._header)

    def shake_hands(self, address: Address, worker: str, segment: Segment, shared: bool) -> int | None:
        """Prove the key to each other; returns the descriptor of the published weights, if they are shared."""
        greeting = Greeting.unpack(self.exactly(GREETING_SIZE))
        num_parameters = len(segment.slots[0].weights)
        hello = Hello.new(address.incarnation, num_parameters, len(segment.slots), shared, worker)
        self.send(hello.pack(address.key, greeting))
        welcome, files = self._welcome(shared)
        try:
            if welcome != hello.welcome(address.key):
                raise FrameError("who answers there does not have this run's key")
            if not shared:
                return None
            if len(files) != 1 or segment.file is None:
                raise FrameError(f"the server passed {len(files)} descriptors, expected 1")
            self._pass(segment.file)
            self.exactly(1)
            return files.pop()
        finally:
            for file in files:
                os.close(file)

    def _pass(self, file: int) -> None:
        try:
            socket.send_fds(self.stream, [b"\0"], [file])
        except OSError as error:
            raise ServerGoneError(f"{GONE}: {error}") from error

    def _welcome(self, shared: bool) -> tuple[bytes, list[int]]:
        if not shared:
            return self.exactly(WELCOME_SIZE), []
        try:
            welcome, files, _, _ = socket.recv_fds(self.stream, WELCOME_SIZE, 1)
        except BlockingIOError as error:
            raise LaneTimeoutError(f"no answer from the server within {self._limit_s} s") from error
        except OSError as error:
            raise ServerGoneError(f"{GONE}: {error}") from error
        if not welcome:
            raise ServerGoneError(CLOSED)
        return welcome, files

    def hang_up(self) -> None:
        """Wake whoever waits for it."""
        shut(self.stream)

    def close(self) -> None:
        """Nobody may wait for it any more: its number may be another's at once."""
        self.hang_up()
        self.stream.close()


def _checked(frame: Frame, kind: FrameKind, slot: int, incarnation: int, payload: int) -> Frame:
    came = (frame.kind, frame.slot, frame.incarnation, frame.payload)
    if came != (kind, slot, incarnation, payload):
        raise FrameError(f"the server answered with {came}, expected {(kind, slot, incarnation, payload)}")
    return frame


class ShmLane:
    """The way to a server on the same node, to be used by one thread.

    Args:
        worker: its name.
        segment: its memory, shared.
        part: the partition's slice of the weights.
        form: of its pushes.
        address: of its server.
        timeout_s: for the handshake.

    Raises:
        ServerGoneError: the server cannot be reached.
        FrameError: the server there does not belong to this run.
        SharedMemoryError: worker and server cannot share memory.
    """

    kind: LaneKind = "shm"

    def __init__(
        self, worker: str, segment: Segment, part: slice, push_format: PushFormat, address: Address, timeout_s: float
    ) -> None:
        if address.path is None or segment.file is None:
            raise SharedMemoryError(
                f"no memory can be shared: {segment.fault or 'the server listens on no Unix socket'}"
            )
        self._worker = worker
        self._push_format = push_format
        self._incarnation = address.incarnation
        self._weights = [slot.weights[part] for slot in segment.slots]
        self._connection = _Connection.unix(address.path, timeout_s)
        try:
            file = self._connection.shake_hands(address, worker, segment, shared=True)
            assert file is not None
            self._published = PublishedVector(push_format.size, file)
        except BaseException:
            self._connection.close()
            raise
        self._reads_itself = stores_are_ordered()
        self._processors = len(allowed_processors())
        self._patient = False  # whether its thread waits for its turn when an answer wakes it
        self._arrived: dict[int, Frame] = {}  # answers of other slots, that came first

    def pull(self, slot: int, timeout_s: float) -> Version:
        """From shared memory; a server that never pauses is asked to copy. See `Lane.pull`."""
        if self._reads_itself and (version := self._published.snapshot(self._weights[slot])):
            return version
        self._connection.limit(timeout_s)
        self._connection.send(Frame(FrameKind.PULL, slot, 0, False, self._incarnation, 0).pack())
        return _checked(self.answer(slot), FrameKind.WEIGHTS, slot, self._incarnation, 0).version

    def version(self, timeout_s: float) -> Version:
        """From shared memory; see `Lane.version`."""
        del timeout_s
        return self._published.version

    def push(self, gradient: Gradient, slot: int, wants: bool) -> Pending:
        """One message; see `Lane.push`."""
        payload = self._push_format.payload(gradient, shared=True)
        size = sum(map(len, payload))
        frame = Frame.of_push(
            gradient, slot, wants and not self._reads_itself, self._incarnation, size, current_processor()
        )
        self._connection.send(frame.pack(), *payload)
        return _ShmPending(self, slot, wants)

    def receipt(self, slot: int, wants: bool, timeout_s: float) -> Receipt:
        """Of the push from that slot."""
        self._connection.limit(timeout_s)
        frame = _checked(self.answer(slot), FrameKind.RECEIPT, slot, self._incarnation, 0)
        receipt = frame.receipt(self._worker)
        # Where workers have to share processors, who is answered had better not stop the thread that answers the rest.
        self._wake(patiently=self._published.poller > self._processors)
        if wants and self._reads_itself:
            return Receipt(receipt.worker, receipt.batch, receipt.outcome, self.pull(slot, timeout_s))
        return receipt

    def _wake(self, patiently: bool) -> None:
        if patiently != self._patient:
            wake(patiently)
            self._patient = patiently

    def answer(self, slot: int) -> Frame:
        """The next frame of that slot."""
        if slot in self._arrived:
            return self._arrived.pop(slot)
        while (frame := self._connection.frame()).slot != slot:
            if frame.slot >= len(self._weights) or frame.slot in self._arrived:
                raise FrameError(f"the server answered slot {frame.slot} of {len(self._weights)} twice, or too often")
            self._arrived[frame.slot] = frame
        return frame

    def hang_up(self) -> None:
        """See `Lane.hang_up`."""
        self._connection.hang_up()

    def close(self) -> None:
        """See `Lane.close`."""
        self._wake(patiently=False)
        self._connection.close()


class _ShmPending:
    __slots__ = ("_lane", "_slot", "_wants")

    def __init__(self, lane: ShmLane, slot: int, wants: bool) -> None:
        self._lane = lane
        self._slot = slot
        self._wants = wants

    def receipt(self, timeout_s: float) -> Receipt:
        return self._lane.receipt(self._slot, self._wants, timeout_s)


class _Fault(NamedTuple):
    """Why a lane ended. An exception, if kept, would keep alive the frames of its traceback and the worker's memory."""

    kind: type[LaneError]
    message: str


_Reply = Future[Frame | _Fault]


class TcpLane:
    """The way to a server on another node; see `ShmLane` for the arguments."""

    kind: LaneKind = "tcp"

    def __init__(
        self, worker: str, segment: Segment, part: slice, push_format: PushFormat, address: Address, timeout_s: float
    ) -> None:
        if address.port is None:
            raise ServerGoneError("the server listens on no network: use lane auto or ray")
        self._worker = worker
        self._push_format = push_format
        self._incarnation = address.incarnation
        self._timeout_s = timeout_s
        self._weights: list[FloatArray] = [slot.weights[part] for slot in segment.slots]
        self._connection = _Connection.tcp(address.host, address.port, timeout_s)
        try:
            self._connection.shake_hands(address, worker, segment, shared=False)
        except BaseException:
            self._connection.close()
            raise
        self._connection.limit(None)  # from here on `_result` limits every wait, and closing ends it
        self._lock = Lock()
        self._wanted: dict[tuple[FrameKind, int], tuple[_Reply, int]] = {}  # answers that are to come, their bytes
        self._fault: _Fault | None = None  # after which no answer comes
        self._sending = ThreadPoolExecutor(1, "psgd-send")
        self._receiving = Thread(target=self._receive, name="psgd-receive", daemon=True)
        self._receiving.start()

    def pull(self, slot: int, timeout_s: float) -> Version:
        """See `Lane.pull`."""
        frame = Frame(FrameKind.PULL, slot, 0, True, self._incarnation, 0)
        return self.result(self._exchange(frame, [], FrameKind.WEIGHTS), timeout_s).version

    def version(self, timeout_s: float) -> Version:
        """See `Lane.version`."""
        frame = Frame(FrameKind.ASK, 0, 0, False, self._incarnation, 0)
        return self.result(self._exchange(frame, [], FrameKind.VERSION), timeout_s).version

    def push(self, gradient: Gradient, slot: int, wants: bool) -> Pending:
        """See `Lane.push`."""
        payload = self._push_format.payload(gradient, shared=False)
        frame = Frame.of_push(gradient, slot, wants, self._incarnation, sum(map(len, payload)))
        return _TcpPending(self, self._exchange(frame, payload, FrameKind.RECEIPT), self._worker)

    def _exchange(self, frame: Frame, payload: Sequence[memoryview], answer: FrameKind) -> _Reply:
        """Have something sent; what comes back is the answer of that kind for the same slot."""
        reply: _Reply = Future()
        weights = self._weights[frame.slot].nbytes if frame.wants else 0
        with self._lock:
            if self._fault:
                raise self._fault.kind(self._fault.message)
            self._wanted[answer, frame.slot] = reply, weights
        self._sending.submit(self._send, frame.pack(), *payload)
        return reply

    def _send(self, *parts: bytes | memoryview) -> None:
        try:
            self._connection.send(*parts)
        except LaneError:
            self._connection.hang_up()  # the receiving thread sees it, and says so to everybody who waits

    def _receive(self) -> None:
        try:
            while True:
                self._answer(self._connection.frame())
        except LaneError as error:
            self._fail(_Fault(type(error), str(error)))

    def _answer(self, frame: Frame) -> None:
        key = frame.kind, frame.slot
        if key not in self._wanted or frame.incarnation != self._incarnation:
            raise FrameError(f"the server sent {frame}, which nobody asked for")
        reply, weights = self._wanted[key]
        if frame.payload != weights:
            raise FrameError(f"the server sent {frame.payload} bytes of weights, expected {weights}")
        if weights:
            self._connection.receive(self._weights[frame.slot].data.cast("B"))
        del self._wanted[key]  # not before: whoever waits is to be told if the server hangs up in the middle
        reply.set_result(frame)

    def _fail(self, fault: _Fault) -> None:
        with self._lock:
            self._fault = fault
            for reply, _ in self._wanted.values():
                reply.set_result(fault)
            self._wanted.clear()

    @staticmethod
    def result(reply: _Reply, timeout_s: float) -> Frame:
        """What came back."""
        try:
            frame = reply.result(timeout_s)
        except TimeoutError as error:
            raise LaneTimeoutError(f"no answer from the server within {timeout_s} s (see failure.timeout_s)") from error
        if isinstance(frame, _Fault):
            raise frame.kind(frame.message)
        return frame

    def hang_up(self) -> None:
        """See `Lane.hang_up`."""
        self._connection.hang_up()

    def close(self) -> None:
        """See `Lane.close`."""
        self._connection.hang_up()
        self._sending.shutdown(cancel_futures=True)
        self._receiving.join()
        self._connection.close()


class _TcpPending:
    __slots__ = ("_lane", "_reply", "_worker")

    def __init__(self, lane: TcpLane, reply: _Reply, worker: str) -> None:
        self._lane = lane
        self._reply = reply
        self._worker = worker

    def receipt(self, timeout_s: float) -> Receipt:
        return self._lane.result(self._reply, timeout_s).receipt(self._worker)
