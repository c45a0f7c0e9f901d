"""A worker's connection to one server: the socket and the handshake of both the shm and the tcp lane."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from time import monotonic
from typing import Self

from psgd_workers.errors import FrameError, LaneTimeoutError, ServerGoneError
from psgd_workers.transport.authentication import FrameAuthenticator, FrameTags
from psgd_workers.transport.frame_stream import FrameStream
from psgd_workers.transport.frames import HEADER_SIZE, Frame
from psgd_workers.transport.handshake import GREETING_SIZE, WELCOME_SIZE, Address, Greeting, Hello
from psgd_workers.transport.handshake_stream import HandshakeStream
from psgd_workers.transport.memory import Segment
from psgd_workers.transport.streams import limit, shut

__all__ = ["ServerConnection"]

GONE = "the server is gone"
CLOSED = f"{GONE}: it closed the connection; the server's log says why"


class ServerConnection:
    """A socket to one server, blocking, with a time limit in the kernel after the handshake.

    Every method that sends or receives raises `LaneTimeoutError` when the limit is over, and `ServerGoneError` when the
    connection is closed or fails.

    Args:
        stream: connected socket.
        connect_s: seconds that connecting and the handshake may take.
        deadline: time on the monotonic clock at which these seconds are over.
    """

    def __init__(self, stream: socket.socket, connect_s: float, deadline: float) -> None:
        self._stream = stream
        self._connect_s = connect_s
        self._deadline = deadline
        self._frames = FrameStream(stream)
        self._has_tags = False
        self._header = memoryview(bytearray(HEADER_SIZE))
        self._limit_s: float | None = None

    @classmethod
    def unix(cls, path: str, timeout_s: float) -> Self:
        """Connect to a Unix socket in Linux' abstract namespace.

        Args:
            path: name of the socket.
            timeout_s: seconds that connecting and the handshake may take together.
        """
        return cls._open(socket.AF_UNIX, "\0" + path, timeout_s)

    @classmethod
    def tcp(cls, host: str, port: int, timeout_s: float) -> Self:
        """Connect to a port of the network.

        Args:
            host: host of the server.
            port: port of the server.
            timeout_s: seconds that connecting and the handshake may take together.
        """
        connection = cls._open(socket.AF_INET, (host, port), timeout_s)
        connection._stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    @classmethod
    def _open(cls, family: int, to: str | tuple[str, int], timeout_s: float) -> Self:
        deadline = monotonic() + timeout_s
        try:
            stream = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:  # for example, too many open files
            raise ServerGoneError(f"cannot reach the server at {to!r}: {error}") from error
        try:
            stream.settimeout(timeout_s)
            stream.connect(to)
        except OSError as error:
            stream.close()
            raise ServerGoneError(f"cannot reach the server at {to!r}: {error}") from error
        return cls(stream, timeout_s, deadline)

    def limit(self, timeout_s: float | None) -> None:
        """Set how many seconds each later call may wait; None: until the connection is closed."""
        if timeout_s != self._limit_s:
            limit(self._stream, timeout_s)
            self._limit_s = timeout_s

    def send(self, header: bytes | bytearray, *payload: bytes | memoryview) -> None:
        """Send a frame."""
        try:
            if payload or self._has_tags:
                self._frames.send(header, *payload)
            else:
                self._stream.sendall(header)
        except BlockingIOError as error:
            raise LaneTimeoutError(f"the server did not read a message within {self._limit_s} s") from error
        except OSError as error:
            raise ServerGoneError(f"{GONE}: {error}") from error

    def receive(self, accept: Callable[[Frame], memoryview]) -> Frame:
        """Receive the next frame, and return its header.

        Args:
            accept: checks a header, and returns the buffer for the payload.

        Raises:
            FrameError: the bytes are no frame of this connection.
        """
        try:
            received = self._frames.receive(accept)
        except BlockingIOError as error:
            raise LaneTimeoutError(f"no answer from the server within {self._limit_s} s") from error
        except OSError as error:
            raise ServerGoneError(f"{GONE}: {error}") from error
        if received is None:
            raise ServerGoneError(CLOSED)
        return received[0]

    def receive_header(self) -> memoryview:
        """Receive the next header. Return memory that the next call overwrites. Only without tags."""
        try:
            got = self._stream.recv_into(self._header)
            while 0 < got < HEADER_SIZE and (more := self._stream.recv_into(self._header[got:])):
                got += more
        except BlockingIOError as error:
            raise LaneTimeoutError(f"no answer from the server within {self._limit_s} s") from error
        except OSError as error:
            raise ServerGoneError(f"{GONE}: {error}") from error
        if got < HEADER_SIZE:
            raise ServerGoneError(CLOSED)
        return self._header

    def shake_hands(
        self, address: Address, worker: str, segment: Segment, shared: bool, authenticates: bool = False
    ) -> int | None:
        """Do the worker's part of the handshake, within the time that is left of the limit for connecting.

        Args:
            address: address of the server, with the key.
            worker: name of the worker.
            segment: memory of the worker.
            shared: True to share the segment and the published weights.
            authenticates: True if every frame after the handshake has a tag.

        Returns:
            The descriptor of the server's published weights; None if nothing is shared.

        Raises:
            FrameError: the server does not belong to this run.
        """
        try:
            handshake = HandshakeStream(self._stream, self._deadline)
            return self._shake_hands(handshake, address, worker, segment, shared, authenticates)
        except TimeoutError as error:
            raise LaneTimeoutError(f"no answer from the server within {self._connect_s} s") from error
        except ConnectionError as error:
            raise ServerGoneError(CLOSED) from error
        except OSError as error:
            raise ServerGoneError(f"{GONE}: {error}") from error
        finally:
            self._stream.settimeout(None)  # from here on `limit` sets limits

    def _shake_hands(
        self,
        handshake: HandshakeStream,
        address: Address,
        worker: str,
        segment: Segment,
        shared: bool,
        authenticates: bool,
    ) -> int | None:
        greeting = Greeting.unpack(handshake.recv(GREETING_SIZE))
        num_parameters = len(segment.slots[0].weights)
        hello = Hello.new(address.incarnation, num_parameters, len(segment.slots), shared, worker)
        handshake.send(hello.pack(address.key, greeting))
        file = None
        if shared:
            welcome, file = handshake.recv_descriptor(WELCOME_SIZE)
        else:
            welcome = handshake.recv(WELCOME_SIZE)
        with ExitStack() as on_error:
            if file is not None:
                on_error.callback(os.close, file)
            if welcome != hello.welcome(address.key):
                raise FrameError("the server at this address does not have this run's key")
            if shared:
                assert segment.file is not None
                handshake.send_descriptor(b"\0", segment.file)
                handshake.recv(1)
            on_error.pop_all()
        if authenticates:
            to_server, to_worker = hello.frame_keys(address.key, greeting)
            self._has_tags = True
            tags = FrameTags(outgoing=FrameAuthenticator(to_server), incoming=FrameAuthenticator(to_worker))
            self._frames = FrameStream(self._stream, tags)
        return file

    def hang_up(self) -> None:
        """Shut the connection down, which ends the waits of all threads. `close` must follow."""
        shut(self._stream)

    def close(self) -> None:
        """Close the socket. No thread may use it any more: the kernel may give its number to a new file."""
        self.hang_up()
        self._stream.close()
