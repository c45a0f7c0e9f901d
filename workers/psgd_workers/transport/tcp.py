"""The tcp lane: worker and server on different nodes.

Weights and gradients travel in the frames. Two threads of the lane send and receive them while the worker computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock, Thread
from typing import NamedTuple

from psgd_workers.errors import FrameError, LaneError, LaneTimeoutError, ServerGoneError
from psgd_workers.messages import FloatArray, Gradient, Receipt, Version
from psgd_workers.transport.frames import Frame, FrameKind, PushFormat
from psgd_workers.transport.handshake import Address
from psgd_workers.transport.lane import LaneKind, Pending
from psgd_workers.transport.memory import Segment
from psgd_workers.transport.server_connection import ServerConnection

__all__ = ["TcpLane"]


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
        self._connection = ServerConnection.tcp(address.host, address.port, timeout_s)
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
