"""Exchanges: the two ways in which a lane sends requests over a connection and receives the answers."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock, Thread
from typing import NamedTuple, Protocol

from psgd_workers.errors import FrameError, LaneError, LaneTimeoutError
from psgd_workers.transport.frames import Frame, FrameKind
from psgd_workers.transport.server_connection import ServerConnection

__all__ = ["Exchange", "Request", "SerialExchange", "ThreadedExchange"]


class Request(NamedTuple):
    """A request that the server still has to answer."""

    kind: FrameKind  # of the answer
    slot: int  # of the request and of the answer
    incarnation: int  # of the server
    into: memoryview  # memory for the payload of the answer, which has exactly this length

    def accept(self, frame: Frame) -> memoryview:
        """Check the header of the answer, and return the memory for its payload.

        Raises:
            FrameError: the frame is not the answer.
        """
        found = (frame.kind, frame.slot, frame.incarnation, frame.payload)
        expected = (self.kind, self.slot, self.incarnation, len(self.into))
        if found != expected:
            raise FrameError(f"the server answered {found}, expected {expected}: kind, slot, incarnation, payload")
        return self.into


class Exchange(Protocol):
    """Interface of an exchange. Only one thread may use it."""

    def send(self, request: Request, header: bytes | bytearray, *payload: memoryview) -> None:
        """Send a request, now or later. No request of the same kind and slot may be unanswered.

        Raises:
            LaneError: the connection failed.
        """

    def answer(self, request: Request, timeout_s: float) -> Frame:
        """Wait for the answer to a request.

        Raises:
            LaneError: the connection failed, or no answer came within the time limit.
        """

    def close(self) -> None:
        """End all waits. The caller closes the connection afterwards."""


class SerialExchange:
    """Sends and receives in the calling thread, one request at a time.

    Args:
        connection: the connection.
        timeout_s: time limit of sending, in seconds, before the first call of `answer`, whose limit applies later.
    """

    def __init__(self, connection: ServerConnection, timeout_s: float) -> None:
        self._connection = connection
        connection.limit(timeout_s)

    def send(self, request: Request, header: bytes | bytearray, *payload: memoryview) -> None:
        """Send a request, and return when the system has all of it."""
        del request
        self._connection.send(header, *payload)

    def answer(self, request: Request, timeout_s: float) -> Frame:
        """Receive the answer."""
        self._connection.limit(timeout_s)
        return self._connection.receive(request.accept)

    def close(self) -> None:
        """Shut the connection down."""
        self._connection.hang_up()


class _Fault(NamedTuple):
    """The error that ended an exchange.

    It is kept as values, because an exception's traceback would keep the worker's memory alive.
    """

    error: type[LaneError]
    message: str


class _Expected(NamedTuple):
    """A request, and its answer or the error that came instead."""

    request: Request
    answer: Future[Frame | _Fault]


class ThreadedExchange:
    """Sends and receives in two threads of its own, while the worker computes."""

    def __init__(self, connection: ServerConnection) -> None:
        self._connection = connection
        connection.limit(None)  # `answer` limits each wait
        self._lock = Lock()  # so that no request is added to `_expected` after `_fail`
        self._expected: dict[tuple[FrameKind, int], _Expected] = {}  # unanswered, by kind of the answer and slot
        self._answers: dict[tuple[FrameKind, int], Future[Frame | _Fault]] = {}  # of the newest requests
        self._fault: _Fault | None = None  # the error that has ended the exchange
        self._sending = ThreadPoolExecutor(1, "psgd-send")
        self._receiving = Thread(target=self._receive, name="psgd-receive", daemon=True)
        self._receiving.start()

    def send(self, request: Request, header: bytes | bytearray, *payload: memoryview) -> None:
        """Begin to send a request."""
        key = (request.kind, request.slot)
        expected = _Expected(request, Future())
        with self._lock:
            if self._fault:
                raise self._fault.error(self._fault.message)
            self._expected[key] = expected
        self._answers[key] = expected.answer
        self._sending.submit(self._send, header, *payload)

    def _send(self, header: bytes | bytearray, *payload: memoryview) -> None:
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
        """Check the header of an answer, and return the memory for its payload.

        The request stays in `_expected`, so that `_fail` reaches it if the payload breaks off.
        """
        expected = self._expected.get((frame.kind, frame.slot))
        if expected is None:
            raise FrameError(f"the server sent {frame}, which answers no request")
        return expected.request.accept(frame)

    def _fail(self, fault: _Fault) -> None:
        """End the exchange: all expected answers, and all later requests, get this fault."""
        with self._lock:
            self._fault = fault
            for _, answer in self._expected.values():
                answer.set_result(fault)
            self._expected.clear()

    def answer(self, request: Request, timeout_s: float) -> Frame:
        """Wait until the receiving thread has the answer."""
        answer = self._answers[request.kind, request.slot]
        try:
            frame = answer.result(timeout_s)
        except TimeoutError as error:
            raise LaneTimeoutError(f"no answer from the server within {timeout_s} s (see failure.timeout_s)") from error
        if isinstance(frame, _Fault):
            raise frame.error(frame.message)
        return frame

    def close(self) -> None:
        """Shut the connection down, and wait until both threads have ended."""
        self._connection.hang_up()
        self._sending.shutdown(cancel_futures=True)
        self._receiving.join()
