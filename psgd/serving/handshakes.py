"""The handshakes under way at one server: a bounded number of connections that have not proved to belong to the run."""

from __future__ import annotations

from socket import socket
from threading import Lock

from psgd_workers.transport.streams import shut

__all__ = ["MAX_HANDSHAKES", "Handshakes"]

MAX_HANDSHAKES = 64


class Handshakes:
    """Connections without a proof yet. When there are too many, the oldest is shut down to make room for a new one.

    A worker sends its proof within milliseconds, so the oldest connection is a silent one. Any thread may call this.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._streams: dict[socket, None] = {}  # in the order in which they began

    def begin(self, stream: socket) -> None:
        """Add a connection, which may shut down the oldest one: the thread that serves that one finds it closed."""
        with self._lock:
            self._streams[stream] = None
            if len(self._streams) > MAX_HANDSHAKES:
                oldest = next(iter(self._streams))
                del self._streams[oldest]
                shut(oldest)

    def end(self, stream: socket) -> None:
        """Remove a connection: it has proved to belong to the run, or was closed. No-op if it was removed before."""
        with self._lock:
            self._streams.pop(stream, None)
