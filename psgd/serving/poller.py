"""One thread that serves all local workers whose pushes are small.

A small push takes mostly the interpreter's time, which only one thread can have at a time. With a thread for each
worker, threads would wait for each other, and a busy server would do half as much.
"""

from __future__ import annotations

import logging
import os
import select
from collections.abc import Callable
from socket import socket
from threading import Lock

from psgd.serving.connection import WorkerConnection
from psgd_workers.transport.memory import PublishedVector
from psgd_workers.transport.streams import limit, shut

__all__ = ["SharedPoller"]

log = logging.getLogger("psgd.lanes")

FRAME_S = 1.0  # seconds that the rest of a header or payload may take; a worker sends each of them as a whole


class SharedPoller:
    """Waits for frames on many connections with epoll. Linux only, like shared memory.

    Args:
        published: the server's weights; the number of polled connections is published with them.
        forget: called with the socket of a closed connection.
    """

    def __init__(self, published: PublishedVector, forget: Callable[[socket], None]) -> None:
        self._published = published
        self._forget = forget
        self._lock = Lock()  # guards `_connections` and `_ended`
        self._ended = False
        self._connections: dict[int, tuple[WorkerConnection, socket]] = {}
        self._poll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC)
        self._poll.register(self._bell, select.EPOLLIN)

    def add(self, connection: WorkerConnection, stream: socket) -> None:
        """Serve a connection from now on. Any thread may call this.

        Raises:
            OSError: the kernel has no room for it, or the polling thread has ended; the connection is unchanged.
        """
        with self._lock:
            if self._ended:
                raise OSError("the polling thread has ended")
            self._add(connection, stream)

    def _add(self, connection: WorkerConnection, stream: socket) -> None:
        number = stream.fileno()
        connection.frame_s = FRAME_S
        limit(stream, FRAME_S)
        self._connections[number] = connection, stream
        self._count()  # before the first answer, so that it is counted
        try:
            self._poll.register(stream, select.EPOLLIN)
        except OSError:
            del self._connections[number]
            self._count()
            connection.frame_s = None
            limit(stream, None)
            raise

    def _count(self) -> None:
        self._published.poller = len(self._connections)

    def run(self) -> None:
        """Serve all connections until `close`."""
        try:
            self._take_turns()
        except Exception:  # a fault of our own: close the connections, so that no worker waits for this thread
            log.exception("all connections with small pushes were closed: the server's polling thread failed")
        with self._lock:
            self._ended = True
        for number, (connection, stream) in list(self._connections.items()):
            shut(stream)
            while connection.take():  # the frames that have arrived already
                pass
            self._leave(number)
        self.release()

    def _take_turns(self) -> None:
        rung = False
        while not rung:
            for number, _ in self._poll.poll():
                if number == self._bell:
                    rung = True
                elif not self._connections[number][0].take():
                    self._leave(number)

    def release(self) -> None:
        """Close the poller's file descriptors. The thread must not run, or have ended."""
        self._poll.close()
        os.close(self._bell)

    def _leave(self, number: int) -> None:
        stream = self._connections.pop(number)[1]
        self._count()
        self._poll.unregister(stream)
        self._forget(stream)

    def close(self) -> None:
        """End `run`. The caller has shut all connections down."""
        with self._lock:
            if not self._ended:
                os.eventfd_write(self._bell, 1)
