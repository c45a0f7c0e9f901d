"""The crowd: the workers of one machine whose pushes are small, served by one thread.

What such a push takes is the interpreter's time, which one thread at a time can have: with a thread for each worker
they would only wait for each other, and a busy server would get half as much done.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from socket import socket

from psgd.cluster.peer import Peer
from psgd_workers.streams import limit

__all__ = ["Crowd"]

FRAME_S = 1.0  # that the rest of a header or a payload may take, which its worker sends as a whole


class Crowd:
    """Takes whose turn it is from the kernel. Linux only, as shared memory is.

    Args:
        forget: called with the connection of who has hung up.
    """

    def __init__(self, forget: Callable[[socket], None]) -> None:
        self._forget = forget
        self._peers: dict[int, tuple[Peer, socket]] = {}
        self._poll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC)
        self._poll.register(self._bell, select.EPOLLIN)

    def add(self, peer: Peer, stream: socket) -> None:
        """Serve it from now on; to be called by any thread.

        Raises:
            OSError: the kernel has no room for one more; the peer is as it was.
        """
        number = stream.fileno()
        peer.frame_s = FRAME_S
        limit(stream, FRAME_S)
        self._peers[number] = peer, stream
        try:
            self._poll.register(stream, select.EPOLLIN)
        except OSError:
            del self._peers[number]
            peer.frame_s = None
            limit(stream, None)
            raise

    def run(self) -> None:
        """Take frames until `close`, and then from nobody any more."""
        rung = False
        while not rung:
            for number, _ in self._poll.poll():
                if number == self._bell:
                    rung = True
                elif not self._peers[number][0].take():
                    self._leave(number)
        for number in list(self._peers):
            while self._peers[number][0].take():  # to its end: it was hung up on
                pass
            self._leave(number)
        self.release()

    def release(self) -> None:
        """Let go of what it watches with: it does not run, or no more."""
        self._poll.close()
        os.close(self._bell)

    def _leave(self, number: int) -> None:
        stream = self._peers.pop(number)[1]
        self._poll.unregister(stream)
        self._forget(stream)

    def close(self) -> None:
        """Have `run` end; everybody was hung up on."""
        os.eventfd_write(self._bell, 1)
