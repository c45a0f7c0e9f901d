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

EMPTY = memoryview(b"")


class _Fault(NamedTuple):
    """The error that ended a lane.

    It is kept as values, because an exception's traceback would keep the worker's memory alive.
    """

    error: type[LaneError]
    message: str


_Answer = Future[Frame | _Fault]


class _Expected(NamedTuple):
    """An answer that the server still has to send."""

    answer: _Answer
    payload: int  # length of its payload, in bytes


class TcpLane:
    """A worker's lane to a server on another node. See `ShmLane` for the arguments.

    Raises:
        ServerGoneError: the server cannot be reached, or does not listen on the network.
        FrameError: the server at this address does not belong to this run.
    """

    kind: LaneKind = "tcp"

    def __init__(
        self, worker: str, segment: Segment, part: slice, push_format: PushFormat, address: Address, timeout_s: float
    ) -> None:
        if address.port is None:
            raise ServerGoneError("the server does not listen on the network: set scaling.lane to auto or ray")
        self._worker = worker
        self._push_format = push_format
        self._incarnation = address.incarnation
        self._weights: list[FloatArray] = [slot.weights[part] for slot in segment.slots]
        self._connection = ServerConnection.tcp(address.host, address.port, timeout_s)
        try:
            self._connection.shake_hands(address, worker, segment, False, push_format.authenticates)
        except BaseException:
            self._connection.close()
            raise
        self._connection.limit(None)  # from here on `wait_for` limits each wait
        self._lock = Lock()  # so that no request is added to `_expected` after `_fail`
        self._expected: dict[tuple[FrameKind, int], _Expected] = {}  # by kind of the answer and slot
        self._fault: _Fault | None = None  # the error that has ended the lane
        self._sending = ThreadPoolExecutor(1, "psgd-send")
        self._receiving = Thread(target=self._receive, name="psgd-receive", daemon=True)
        self._receiving.start()

    def pull(self, slot: int, timeout_s: float) -> Version:
        """Implement `Lane.pull`."""
        frame = Frame(FrameKind.PULL, slot, 0, True, self._incarnation, 0)
        return self.wait_for(self._send(frame, [], FrameKind.WEIGHTS), timeout_s).version

    def version(self, timeout_s: float) -> Version:
        """Implement `Lane.version`."""
        frame = Frame(FrameKind.ASK, 0, 0, False, self._incarnation, 0)
        return self.wait_for(self._send(frame, [], FrameKind.VERSION), timeout_s).version

    def push(self, gradient: Gradient, slot: int, wants: bool) -> Pending:
        """Implement `Lane.push`."""
        payload = self._push_format.payload(gradient, shared=False)
        frame = Frame.of_push(gradient, slot, wants, self._incarnation, sum(map(len, payload)))
        return _TcpPending(self, self._send(frame, payload, FrameKind.RECEIPT), self._worker)

    def _send(self, frame: Frame, payload: Sequence[memoryview], kind: FrameKind) -> _Answer:
        """Begin to send a frame, and return the answer for which `wait_for` waits.

        Args:
            frame: header of the frame.
            payload: parts of its payload.
            kind: kind of the answer, which has the same slot.
        """
        expected = _Expected(Future(), self._weights[frame.slot].nbytes if frame.wants else 0)
        with self._lock:
            if self._fault:
                raise self._fault.error(self._fault.message)
            self._expected[kind, frame.slot] = expected
        self._sending.submit(self._send_parts, frame.pack(), *payload)
        return expected.answer

    def _send_parts(self, header: bytes, *payload: memoryview) -> None:
        try:
            self._connection.send(header, *payload)
        except LaneError:
            self._connection.hang_up()  # this ends the receiving thread, which then fails all expected answers

    def _receive(self) -> None:
        try:
            while True:
                frame = self._connection.receive(self._accept)
                self._expected.pop((frame.kind, frame.slot)).answer.set_result(frame)
        except LaneError as error:
            self._fail(_Fault(type(error), str(error)))

    def _accept(self, frame: Frame) -> memoryview:
        """Check the header of an answer, and return the buffer for its weights.

        The answer stays in `_expected`, so that `_fail` reaches it if the payload breaks off.
        """
        key = (frame.kind, frame.slot)
        if key not in self._expected or frame.incarnation != self._incarnation:
            raise FrameError(f"the server sent {frame}, which answers no request")
        payload = self._expected[key].payload
        if frame.payload != payload:
            raise FrameError(f"the server sent {frame.payload} bytes of weights, expected {payload}")
        return self._weights[frame.slot].data.cast("B") if payload else EMPTY

    def _fail(self, fault: _Fault) -> None:
        """End the lane: all expected answers, and all later requests, get this fault."""
        with self._lock:
            self._fault = fault
            for answer, _ in self._expected.values():
                answer.set_result(fault)
            self._expected.clear()

    @staticmethod
    def wait_for(answer: _Answer, timeout_s: float) -> Frame:
        """Return the answer's header, or raise the error that ended the lane."""
        try:
            frame = answer.result(timeout_s)
        except TimeoutError as error:
            raise LaneTimeoutError(f"no answer from the server within {timeout_s} s (see failure.timeout_s)") from error
        if isinstance(frame, _Fault):
            raise frame.error(frame.message)
        return frame

    def hang_up(self) -> None:
        """Implement `Lane.hang_up`."""
        self._connection.hang_up()

    def close(self) -> None:
        """Implement `Lane.close`."""
        self._connection.hang_up()
        self._sending.shutdown(cancel_futures=True)
        self._receiving.join()
        self._connection.close()


class _TcpPending:
    __slots__ = ("_answer", "_lane", "_worker")

    def __init__(self, lane: TcpLane, answer: _Answer, worker: str) -> None:
        self._lane = lane
        self._answer = answer
        self._worker = worker

    def receipt(self, timeout_s: float) -> Receipt:
        return self._lane.wait_for(self._answer, timeout_s).receipt(self._worker)
