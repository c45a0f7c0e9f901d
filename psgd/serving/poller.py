"""One thread that serves all local workers whose pushes are small.

A small push costs mostly the interpreter's time, which only one thread can use at a time. With a thread for each
worker, threads would wait for each other, and a busy server would apply half as many pushes.
"""

from __future__ import annotations

import logging
import os
import select
from collections.abc import Callable
from math import inf
from socket import socket
from threading import Lock
from time import monotonic

from psgd.serving.connection import WorkerConnection
from psgd_workers.transport.memory import PublishedVector
from psgd_workers.transport.streams import shut

__all__ = ["SharedPoller"]

log = logging.getLogger("psgd.lanes")

FRAME_S = 1.0  # seconds that the rest of a frame may take after its first bytes; a worker sends it as a whole


class SharedPoller:
    """Waits for frames on many connections with epoll. Linux only, like shared memory.

    Args:
        published: the server's weights. The number of connections that are polled is published with them.
        forget: called with the socket of a closed connection.
    """

    def __init__(self, published: PublishedVector, forget: Callable[[socket], None]) -> None:
        self._published = published
        self._forget = forget
        self._lock = Lock()  # guards `_connections` and `_ended`
        self._ended = False
        self._connections: dict[int, tuple[WorkerConnection, socket]] = {}
        self._in_part: set[int] = set()  # connections on which a part of a frame has arrived
        self._poll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC)  # `close` writes to it, which ends the wait for frames
        self._poll.register(self._bell, select.EPOLLIN)

    def add(self, connection: WorkerConnection, stream: socket) -> None:
        """Serve a connection from now on. Any thread may call this.

        Raises:
            OSError: the kernel cannot poll one more, or the polling thread has ended. The connection is unchanged.
        """
        with self._lock:
            if self._ended:
                raise OSError("the polling thread has ended")
            self._add(connection, stream)

    def _add(self, connection: WorkerConnection, stream: socket) -> None:
        number = stream.fileno()
        self._connections[number] = connection, stream
        self._count()  # before the worker gets its first answer, so that it reads the new number
        try:
            self._poll.register(stream, select.EPOLLIN)
        except OSError:
            del self._connections[number]
            self._count()
            raise

    def _count(self) -> None:
        self._published.num_polled = len(self._connections)

    def run(self) -> None:
        """Serve all connections until `close`."""
        try:
            self._poll_until_closed()
        except Exception:  # a fault of the server: close the connections, so that no worker waits in vain
            log.exception("all connections with small pushes were closed: the server's polling thread failed")
        with self._lock:
            self._ended = True
        for number, (connection, stream) in list(self._connections.items()):
            shut(stream)
            while connection.serve_part():  # the frames that had arrived before
                pass
            self._remove(number)
        self.release()

    def _poll_until_closed(self) -> None:
        is_closed = False
        while not is_closed:
            for number, _ in self._poll.poll(FRAME_S if self._in_part else None):
                if number == self._bell:
                    is_closed = True
                else:
                    self._serve(number)
            if self._in_part:
                self._drop_overdue(monotonic())

    def _serve(self, number: int) -> None:
        connection = self._connections[number][0]
        if not connection.serve_part():
            self._remove(number)
        elif connection.part_since < inf:
            self._in_part.add(number)
        elif self._in_part:
            self._in_part.discard(number)

    def _drop_overdue(self, now: float) -> None:
        """Close the connections on which the rest of a frame has been awaited for too long."""
        for number in list(self._in_part):
            connection = self._connections[number][0]
            if now - connection.part_since >= FRAME_S:
                connection.drop(f"the rest of a frame did not arrive within {FRAME_S} s")
                self._remove(number)

    def release(self) -> None:
        """Close the poller's file descriptors. `run` calls this; only a poller that never runs needs it."""
        self._poll.close()
        os.close(self._bell)

    def _remove(self, number: int) -> None:
        stream = self._connections.pop(number)[1]
        self._in_part.discard(number)
        self._count()
        self._poll.unregister(stream)
        self._forget(stream)

    def close(self) -> None:
        """End `run`. The caller has shut all connections down."""
        with self._lock:
            if not self._ended:
                os.eventfd_write(self._bell, 1)
