"""A stream of frames over a connected socket. On the network, each header is followed by the frame's tag."""

from __future__ import annotations

import socket
from collections.abc import Callable
from math import inf
from time import monotonic

from psgd_workers.transport.authentication import TAG_SIZE, FrameAuthenticator
from psgd_workers.transport.frames import HEADER_SIZE, Frame
from psgd_workers.transport.streams import receive, send

__all__ = ["Accept", "FrameStream"]

INCOMPLETE = "the other end closed it in the middle of a frame"

Accept = Callable[[Frame], memoryview]


class FrameStream:
    """Sends and receives frames. One thread may send while another receives.

    Args:
        stream: connected socket, blocking.
        outgoing: makes the tags of sent frames; None: they have none.
        incoming: checks the tags of received frames; None: they have none.

    Attributes:
        is_closed: True once the other end has closed the connection between two frames.
        part_since: monotonic time at which a part of a frame arrived whose rest is still to come, else infinity.
    """

    def __init__(
        self,
        stream: socket.socket,
        outgoing: FrameAuthenticator | None = None,
        incoming: FrameAuthenticator | None = None,
    ) -> None:
        self._stream = stream
        self._outgoing = outgoing
        self._incoming = incoming
        self._buffer = memoryview(bytearray(HEADER_SIZE + TAG_SIZE if incoming else HEADER_SIZE))
        self._header = self._buffer[:HEADER_SIZE]
        self._got = 0  # bytes that `receive_part` has of the header, or of the payload
        self._frame: tuple[Frame, memoryview] | None = None  # whose header `receive_part` has received
        self.is_closed = False
        self.part_since = inf

    def send(self, header: bytes, *payload: bytes | memoryview) -> None:
        """Send a frame.

        Raises:
            OSError: sending failed, or its time limit is over.
        """
        if self._outgoing is None:
            send(self._stream, header, *payload)
        else:
            send(self._stream, header, self._outgoing.tag((header, *payload)), *payload)

    def receive(self, accept: Accept) -> tuple[Frame, memoryview] | None:
        """Wait for a whole frame.

        Args:
            accept: checks a header, and returns the buffer for the payload, whose length the header gives.

        Returns:
            The header and the payload; None if the connection is closed.

        Raises:
            FrameError: the bytes are no frame, or not the one that was sent.
            OSError: receiving failed, its time limit is over, or the other end closed the connection within a frame.
        """
        got = receive(self._stream, self._buffer)
        if not got:
            self.is_closed = True
            return None
        if got < len(self._buffer):
            raise ConnectionError(INCOMPLETE)
        frame = Frame.unpack(self._header)
        payload = accept(frame)
        if frame.payload and receive(self._stream, payload) < frame.payload:
            raise ConnectionError(INCOMPLETE)
        if self._incoming is not None:
            self._check(payload)
        return frame, payload

    def receive_part(self, accept: Accept) -> tuple[Frame, memoryview] | None:
        """Receive what has arrived of a frame, without waiting; see `receive`. None: the frame is not whole yet."""
        if self._frame is None:
            if not self._fill(self._buffer):
                return None
            frame = Frame.unpack(self._header)
            self._frame = frame, accept(frame)
        frame, payload = self._frame
        if frame.payload and not self._fill(payload):
            return None
        self._frame = None
        self.part_since = inf
        if self._incoming is not None:
            self._check(payload)
        return frame, payload

    def _fill(self, into: memoryview) -> bool:
        """Receive what has arrived of `into`. Return True once it is full."""
        try:
            count = self._stream.recv_into(into[self._got :] if self._got else into, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            count = None
        if count == 0:
            if self._got or self._frame:
                raise ConnectionError(INCOMPLETE)
            self.is_closed = True
            return False
        self._got += count or 0
        if self._got < len(into):
            self.part_since = min(self.part_since, monotonic())
            return False
        self._got = 0
        return True

    def _check(self, payload: memoryview) -> None:
        assert self._incoming is not None
        self._incoming.check(self._buffer[HEADER_SIZE:], (self._header, payload))
