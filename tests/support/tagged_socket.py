"""A worker's socket that a test uses by hand, on a connection whose frames have tags."""

from __future__ import annotations

import socket
from typing import Any

from psgd_workers.transport.authentication import FrameAuthenticator, FrameTags
from psgd_workers.transport.frame_stream import FrameStream
from psgd_workers.transport.frames import HEADER_SIZE

__all__ = ["TaggedSocket"]


class TaggedSocket(socket.socket):
    """Sends and receives frames without tags, as the test sees them; on the wire they have tags.

    `sendall` takes a whole frame in each call, or fewer bytes than a header, which are sent as they are.

    Attributes:
        keys: keys of the frames to the server, and of those to the worker.
    """

    keys: tuple[bytes, bytes]
    _frames: FrameStream | None = None
    _received = b""

    def begin(self) -> None:
        """Begin with the tags after the handshake."""
        outgoing, incoming = map(FrameAuthenticator, self.keys)
        self._frames = FrameStream(self, FrameTags(outgoing, incoming))

    def tagged(self, frame: bytes) -> bytes:
        """Return a frame with its tag. It has to be sent before the next one."""
        assert self._frames is not None
        assert self._frames.tags is not None
        header = frame[:HEADER_SIZE]
        payload = frame[HEADER_SIZE:]
        return header + self._frames.tags.outgoing.tag((header, payload)) + payload

    def send_wire(self, data: bytes) -> None:
        """Send bytes as they are."""
        super().sendall(data)

    def sendall(self, data: Any, flags: int = 0) -> None:
        has_header = self._frames is not None and len(data) >= HEADER_SIZE
        super().sendall(self.tagged(data) if has_header else data, flags)

    def recv(self, size: int, flags: int = 0) -> bytes:
        if self._frames is None:
            return super().recv(size, flags)
        if not self._received and (frame := self._frames.receive(lambda header: memoryview(bytearray(header.payload)))):
            self._received = bytes(self._frames.head[:HEADER_SIZE]) + frame[1]
        data = self._received[:size]
        self._received = self._received[size:]
        return data
