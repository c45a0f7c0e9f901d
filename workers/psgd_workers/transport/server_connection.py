"""A worker's connection to one server, which the shm and tcp lanes share."""

from __future__ import annotations

import os
import socket
from typing import Self

from psgd_workers.errors import FrameError, LaneTimeoutError, ServerGoneError
from psgd_workers.transport.frames import HEADER_SIZE, Frame
from psgd_workers.transport.handshake import GREETING_SIZE, WELCOME_SIZE, Address, Greeting, Hello
from psgd_workers.transport.memory import Segment
from psgd_workers.transport.streams import limit, receive, send, shut

__all__ = ["ServerConnection"]

GONE = "the server is gone"
CLOSED = f"{GONE}: it closed the connection; its log says why"


class ServerConnection:
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
