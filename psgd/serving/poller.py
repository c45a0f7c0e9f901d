"""The crowd: the workers of one machine whose pushes are small, served by one thread.

What such a push takes is the interpreter's time, which one thread at a time can have: with a thread for each worker
they would only wait for each other, and a busy server would get half as much done.
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

FRAME_S = 1.0  # that the rest of a header or a payload may take, which its worker sends as a whole


class SharedPoller:
    """Takes whose turn it is from the kernel. Linux only, as shared memory is.

    Args:
        published: the server's weights; their readers are told how many they are.
        forget: called with the connection of who has hung up.
    """

    def __init__(self, published: PublishedVector, forget: Callable[[socket], None]) -> None:
        self._published = published
        self._forget = forget
        self._lock = Lock()  # of who is in it, and whether anybody can be
        self._ended = False
        self._connections: dict[int, tuple[WorkerConnection, socket]] = {}
        self._poll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC)
        self._poll.register(self._bell, select.EPOLLIN)

    def add(self, connection: WorkerConnection, stream: socket) -> None:
        """Serve it from now on; to be called by any thread.

        Raises:
            OSError: the kernel has no room for one more, or the thread has ended; the peer is as it was.
        """
        with self._lock:
            if self._ended:
                raise OSError("the thread that serves the others has ended")
            self._add(connection, stream)

    def _add(self, connection: WorkerConnection, stream: socket) -> None:
        number = stream.fileno()
        connection.frame_s = FRAME_S
        limit(stream, FRAME_S)
        self._connections[number] = connection, stream
        self._count()  # so that who is answered is counted
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
        """Take frames until `close`, and then from nobody any more."""
        try:
            self._take_turns()
        except Exception:  # our own: nobody need wait for a thread that is not there
            log.exception("the connections of all workers with small pushes were closed by the server's own fault")
        with self._lock:
            self._ended = True
        for number, (connection, stream) in list(self._connections.items()):
            shut(stream)
            while connection.take():  # to its end
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
        """Let go of what it watches with: it does not run, or no more."""
        self._poll.close()
        os.close(self._bell)

    def _leave(self, number: int) -> None:
        stream = self._connections.pop(number)[1]
        self._count()
        self._poll.unregister(stream)
        self._forget(stream)

    def close(self) -> None:
        """Have `run` end, if it has not; everybody was hung up on."""
        with self._lock:
            if not self._ended:
                os.eventfd_write(self._bell, 1)
