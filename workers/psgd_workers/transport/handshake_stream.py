"""A stream for the messages of a handshake, all of which must pass before one deadline."""

from __future__ import annotations

import os
import socket
from time import monotonic

from psgd_workers.errors import FrameError

__all__ = ["HandshakeStream"]


class HandshakeStream:
    """Sends and receives whole messages over a socket until a deadline.

    The deadline is that of the whole handshake: the other end cannot extend it by sending one byte at a time.

    Args:
        stream: connected socket.
        deadline: latest time on the monotonic clock, in seconds.

    Raises:
        TimeoutError: in every method, after the deadline.
        ConnectionError: in the methods that receive, if the other end closes the connection.
    """

    def __init__(self, stream: socket.socket, deadline: float) -> None:
        self._stream = stream
        self._deadline = deadline

    def _limit(self) -> None:
        """Let the next call of the socket wait until the deadline."""
        left_s = self._deadline - monotonic()
        if left_s <= 0:
            raise TimeoutError
        self._stream.settimeout(left_s)

    def send(self, data: bytes) -> None:
        """Send all bytes."""
        self._limit()
        self._stream.sendall(data)

    def recv(self, size: int) -> bytes:
        """Receive `size` bytes."""
        data = b""
        while len(data) < size:
            self._limit()
            more = self._stream.recv(size - len(data))
            if not more:
                raise ConnectionError("the other end closed the connection")
            data += more
        return data

    def send_descriptor(self, data: bytes, file: int) -> None:
        """Send bytes together with a file descriptor."""
        self._limit()
        socket.send_fds(self._stream, [data], [file])

    def recv_descriptor(self, size: int) -> tuple[bytes, int]:
        """Receive `size` bytes together with one file descriptor, which the caller must close.

        Raises:
            FrameError: the message has another length, or comes with another number of descriptors.
        """
        self._limit()
        data, files, _, _ = socket.recv_fds(self._stream, size, 1)
        if len(data) == size and len(files) == 1:
            return data, files[0]
        for file in files:
            os.close(file)
        if not data:
            raise ConnectionError("the other end closed the connection")
        raise FrameError(
            f"a message of the handshake has {len(data)} bytes and {len(files)} descriptors, expected {size} and 1"
        )
