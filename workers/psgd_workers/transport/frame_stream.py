"""A stream of frames over a connected socket. On the network, each header is followed by the frame's tag."""

from __future__ import annotations

import socket
from collections.abc import Callable

from psgd_workers.transport.authentication import TAG_SIZE, FrameTags
from psgd_workers.transport.frames import HEADER_SIZE, Frame
from psgd_workers.transport.streams import receive, send

__all__ = ["Accept", "FrameStream"]

INCOMPLETE = "the other end closed it in the middle of a frame"

Accept = Callable[[Frame], memoryview]


class FrameStream:
    """Sends and receives frames. One thread may send while another receives.

    Args:
        stream: connected socket, blocking.
        tags: tags of the frames; None: they have none.

    Attributes:
        tags: tags of the frames; None: they have none.
        head: memory of the header that was received last, and of its tag if frames have tags.
    """

    def __init__(self, stream: socket.socket, tags: FrameTags | None = None) -> None:
        self._stream = stream
        self.tags = tags
        self.head = memoryview(bytearray(HEADER_SIZE + TAG_SIZE if tags else HEADER_SIZE))
        self._header = self.head[:HEADER_SIZE]

    def send(self, header: bytes | bytearray, *payload: bytes | memoryview) -> None:
        """Send a frame.

        Raises:
            OSError: sending failed, or its time limit is over.
        """
        if self.tags is None:
            send(self._stream, header, *payload)
        else:
            send(self._stream, header, self.tags.outgoing.tag((header, *payload)), *payload)

    def receive(self, accept: Accept, header_got: int = 0, payload_got: int = 0) -> tuple[Frame, memoryview] | None:
        """Wait for a whole frame.

        Args:
            accept: checks a header, and returns the buffer for the payload, whose length the header gives.
            header_got: bytes that `head` contains already.
            payload_got: bytes of the payload that the buffer contains already.

        Returns:
            The header and the payload; None if the connection is closed.

        Raises:
            FrameError: the bytes are no frame, or not the one that was sent.
            OSError: receiving failed, its time limit is over, or the other end closed the connection within a frame.
        """
        got = header_got + receive(self._stream, self.head[header_got:])
        if not got:
            return None
        if got < len(self.head):
            raise ConnectionError(INCOMPLETE)
        frame = Frame.unpack(self._header)
        payload = accept(frame)
        if payload_got + receive(self._stream, payload[payload_got:]) < frame.payload:
            raise ConnectionError(INCOMPLETE)
        if self.tags is not None:
            self.tags.incoming.check(self.head[HEADER_SIZE:], (self._header, payload))
        return frame, payload
