"""The listener: where a server's workers come in, by the shm and tcp lanes.

A thread accepts, and each peer gets a thread of its own, which shakes hands and then takes frames; no other waits for
it. Who is silent in the handshake is dropped after a moment, who sends what is no frame of this job is dropped at once,
with a line in the log, and who does not read is sent no more than it was promised.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import socket
from collections.abc import Callable
from threading import BoundedSemaphore, Event, Lock, Thread
from time import monotonic

from psgd.serving.connection import WorkerConnection
from psgd.serving.host import ServerHost
from psgd.serving.poller import SharedPoller
from psgd_workers.errors import FrameError, LaneError, ListenError
from psgd_workers.transport.affinity import allowed_processors
from psgd_workers.transport.frames import PushFormat
from psgd_workers.transport.handshake import HELLO_SIZE, KEY_SIZE, Address, Greeting, Hello
from psgd_workers.transport.memory import PublishedVector, Segment
from psgd_workers.transport.streams import shut

__all__ = ["Listener"]

HANDSHAKE_S = 5.0
JOIN_S = 5.0  # for a thread to end that was hung up on
HANDSHAKES = 64  # at a time; more wait in the kernel's queue
MAX_SLOTS = 8  # of one worker: a pipeline's depth and one
BACKLOG = 1024
RETRY_S = 1.0  # after a worker could not be accepted
SILENCE_S, PROBES = 60, 5  # after which a worker on another node is asked for a sign of life, and how often

log = logging.getLogger("psgd.lanes")


class Listener:
    """Listens for a server's workers.

    Args:
        host: whose workers those are.
        form: of their pushes.
        num_parameters: of the whole weights.
        part: the partition's slice of them.
        published: the server's weights, if they are in shared memory.

    Attributes:
        key: what workers must have.
        path: of the Unix socket; None: there is none.
        port: of the network socket; None: there is none.
    """

    def __init__(
        self,
        host: ServerHost,
        push_format: PushFormat,
        num_parameters: int,
        part: slice,
        published: PublishedVector | None,
    ) -> None:
        self._host = host
        self._push_format = push_format
        self._num_parameters = num_parameters
        self._part = part
        self._published = published
        self.key = secrets.token_bytes(KEY_SIZE)
        self.path: str | None = None
        self.port: int | None = None
        self._processors = len(allowed_processors())
        self._closing = Event()
        self._lock = Lock()  # of what follows
        self._sockets: list[socket.socket] = []  # that listen
        self._streams: set[socket.socket] = set()  # of peers
        self._local = 0  # workers of this machine, each served by a thread of its own
        self._threads: set[Thread] = set()
        self._poller: SharedPoller | None = None

    def listen_unix(self) -> None:
        """On a Unix socket in Linux' abstract namespace: it has no file, so none is left behind.

        Raises:
            ListenError: the system gives no Unix socket.
        """
        path = f"psgd-{secrets.token_hex(8)}"
        try:
            self._listen(socket.AF_UNIX, "\0" + path, shared=True)
        except OSError as error:
            raise ListenError(f"cannot listen on a Unix socket: {error}") from error
        self.path = path

    def listen_tcp(self, host: str, ports: tuple[int, int] | None) -> None:
        """On one port of this machine.

        Args:
            host: the machine's own address.
            ports: first and last of those allowed; None: any.

        Raises:
            ListenError: no port is free, or the address is not this machine's.
        """
        first, last = ports or (0, 0)
        for port in range(first, last + 1):
            try:
                self.port = self._listen(socket.AF_INET, (host, port), shared=False).getsockname()[1]
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise ListenError(f"cannot listen on {host}:{port}: {error}") from error
            else:
                return
        raise ListenError(f"no port from {first} to {last} is free on {host}: widen scaling.ports, or leave it out")

    def _listen(self, family: int, to: str | tuple[str, int], shared: bool) -> socket.socket:
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            if family == socket.AF_INET:  # a predecessor's connections may linger on the port for a minute
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(to)
            listening.listen(BACKLOG)
            self._start("psgd-listener", self._accept, listening, shared)
        except RuntimeError as error:
            listening.close()
            raise ListenError(f"cannot listen: {error}") from error
        except OSError:
            listening.close()
            raise
        self._sockets.append(listening)
        return listening

    def address(self, node: str, host: str) -> Address:
        """What workers are told."""
        incarnation = self._host.server.version.incarnation
        return Address(node, self.path, host, self.port, incarnation, self.key)

    def close(self) -> None:
        """Hang up on everybody, and listen no more."""
        with self._lock:
            self._closing.set()
            for stream in (*self._sockets, *self._streams):
                shut(stream)  # which ends its thread
            if self._poller is not None:
                self._poller.close()
                self._poller = None
            threads = list(self._threads)
        for thread in threads:
            thread.join(JOIN_S)
        for listening in self._sockets:
            listening.close()

    def _start(self, name: str, work: Callable[..., None], *arguments: object) -> None:
        def run() -> None:
            try:
                work(*arguments)
            finally:
                self._threads.discard(thread)

        thread = Thread(target=run, name=name, daemon=True)
        self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError:
            self._threads.discard(thread)
            raise

    def _accept(self, listening: socket.socket, shared: bool) -> None:
        handshakes = BoundedSemaphore(HANDSHAKES)
        while True:
            handshakes.acquire()
            try:
                self._let_in(listening.accept()[0], shared, handshakes)
            except (OSError, RuntimeError, MemoryError) as error:  # too many files or threads, say: better luck later
                handshakes.release()
                if self._closing.is_set():
                    return
                log.warning("cannot accept a worker: %s", error)
                self._closing.wait(RETRY_S)

    def _let_in(self, stream: socket.socket, shared: bool, handshakes: BoundedSemaphore) -> None:
        with self._lock:
            self._streams.add(stream)
            if self._closing.is_set():
                shut(stream)
            try:
                self._start("psgd-peer", self._serve, stream, shared, handshakes)
            except RuntimeError:
                self._streams.discard(stream)
                stream.close()
                raise

    def _serve(self, stream: socket.socket, shared: bool, handshakes: BoundedSemaphore) -> None:
        """One peer, from its first word to its last, unless the crowd takes it over."""
        crowded = False
        try:
            crowded = self._served_by_poller(stream, shared, handshakes)
        finally:
            if not crowded:
                self._forget(stream)

    def _served_by_poller(self, stream: socket.socket, shared: bool, handshakes: BoundedSemaphore) -> bool:
        connection = self._admit(stream, shared, handshakes)
        if connection is None:
            return False
        if shared and self._push_format.is_small:
            try:
                with self._lock:
                    if not self._closing.is_set():
                        self._join_poller(connection, stream)
                        return True
            except (OSError, RuntimeError) as error:  # too many files or threads, say: this thread is there already
                log.warning("a worker is served by a thread of its own: %s", error)
        self._serve_alone(connection, shared)
        return False

    def _serve_alone(self, connection: WorkerConnection, shared: bool) -> None:
        with self._lock:
            self._local += shared
        try:
            connection.run(self._is_full)
        finally:
            with self._lock:
                self._local -= shared

    def _is_full(self) -> bool:
        """Whether every processor of this machine has a worker."""
        return self._local >= self._processors

    def _join_poller(self, connection: WorkerConnection, stream: socket.socket) -> None:
        if self._poller is None:
            assert self._published is not None, "local workers share it"
            poller = SharedPoller(self._published, self._forget)
            try:
                self._start("psgd-crowd", poller.run)
            except RuntimeError:
                poller.release()
                raise
            self._poller = poller
        self._poller.add(connection, stream)

    def _forget(self, stream: socket.socket) -> None:
        with self._lock:
            self._streams.discard(stream)
        stream.close()

    def _admit(self, stream: socket.socket, shared: bool, handshakes: BoundedSemaphore) -> WorkerConnection | None:
        try:
            return self._shake_hands(stream, shared)
        except TimeoutError:
            log.warning("a peer was dropped: it did not finish its handshake within %s s", HANDSHAKE_S)
        except (LaneError, OSError, RuntimeError, UnicodeDecodeError) as error:  # RuntimeError: no more threads
            log.warning("a peer was dropped in its handshake: %s", error)
        finally:
            handshakes.release()
        return None

    def _shake_hands(self, stream: socket.socket, shared: bool) -> WorkerConnection:
        handshake = HandshakeStream(stream, monotonic() + HANDSHAKE_S)
        greeting = Greeting.new()
        handshake.send(greeting.pack())
        hello = Hello.unpack(handshake.recv(HELLO_SIZE), self.key, greeting)
        self._check(hello, shared)
        welcome = hello.welcome(self.key)
        segment = None
        if shared:
            assert self._published is not None
            socket.send_fds(stream, [welcome], [self._published.file])
            segment = Segment(self._num_parameters, hello.slots, handshake.descriptor())
            handshake.send(b"\0")
        else:
            _keep_alive(stream)
            handshake.send(welcome)
        stream.settimeout(None)  # from here on closing ends every wait
        return WorkerConnection(self._host, self._push_format, self._part, stream, hello, segment)

    def _check(self, hello: Hello, shared: bool) -> None:
        expected = (self._host.server.version.incarnation, self._num_parameters, shared)
        if (hello.incarnation, hello.num_parameters, hello.shared) != expected or not 0 < hello.slots <= MAX_SLOTS:
            raise FrameError(
                f"{hello.worker} expects incarnation, values, sharing {hello.incarnation}, {hello.num_parameters}, "
                f"{hello.shared} in {hello.slots} slots; here they are {expected}, and slots 1 to {MAX_SLOTS}"
            )


class HandshakeStream:
    """A handshake's words, all of them before a deadline of the machine's monotonic clock.

    Raises:
        TimeoutError: they came too late.
    """

    def __init__(self, stream: socket.socket, deadline: float) -> None:
        self._stream = stream
        self._deadline = deadline

    def _limit(self) -> None:
        left = self._deadline - monotonic()
        if left <= 0:
            raise TimeoutError
        self._stream.settimeout(left)

    def send(self, data: bytes) -> None:
        self._limit()
        self._stream.sendall(data)

    def recv(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            self._limit()
            more = self._stream.recv(size - len(data))
            if not more:
                raise FrameError("it hung up")
            data += more
        return data

    def descriptor(self) -> int:
        """The one file descriptor that comes with one byte."""
        self._limit()
        byte, files, _, _ = socket.recv_fds(self._stream, 1, 1)
        if len(byte) != 1 or len(files) != 1:
            for file in files:
                os.close(file)
            raise FrameError(f"it passed {len(files)} descriptors of its memory, expected 1")
        return files[0]


def _keep_alive(stream: socket.socket) -> None:
    """Send small messages at once, and find out when a machine is gone that could not say so."""
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", SILENCE_S), ("TCP_KEEPINTVL", SILENCE_S), ("TCP_KEEPCNT", PROBES)):
        if hasattr(socket, option):
            stream.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
