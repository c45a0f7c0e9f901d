"""The listener: it accepts the connections of a server's workers on the shm and tcp lanes.

A thread accepts connections. Each connection gets a thread of its own, which does the handshake and then serves frames,
so that no worker waits for another. A connection is closed, with a line in the log, if its handshake fails or takes too
long, if the worker sends bytes that are no frame of this job, or if it sends requests without reading the answers.
Processes of other users, who can connect to a Unix socket in the abstract namespace, are refused before the handshake.
"""

from __future__ import annotations

import errno
import os
import secrets
import socket
from collections.abc import Callable
from struct import Struct
from threading import Event, Lock, Thread
from time import monotonic

from psgd.serving.connection import WorkerConnection
from psgd.serving.handshakes import Handshakes
from psgd.serving.host import ServerHost
from psgd.serving.limited_log import LimitedLog
from psgd_workers.errors import FrameError, LaneError, ListenError
from psgd_workers.transport.authentication import FrameAuthenticator, FrameTags
from psgd_workers.transport.frame_stream import FrameStream
from psgd_workers.transport.frames import PushFormat
from psgd_workers.transport.handshake import HELLO_SIZE, KEY_SIZE, Address, Greeting, Hello
from psgd_workers.transport.handshake_stream import HandshakeStream
from psgd_workers.transport.memory import PublishedVector, Segment
from psgd_workers.transport.streams import shut

__all__ = ["Listener"]

HANDSHAKE_S = 5.0  # seconds that a handshake may take
JOIN_S = 5.0  # seconds to wait for a thread to end after its connection was shut down
MAX_SLOTS = 8  # slots of one worker: the depth of its pipeline plus one
BACKLOG = 1024  # connections in the kernel's queue
RETRY_S = 1.0  # seconds until the next attempt after a connection could not be accepted
SILENCE_S = 60  # seconds of silence after which the kernel probes a connection to another node
PROBES = 5  # unanswered probes after which the kernel closes the connection
SEND_S = 60  # seconds that the worker may leave an answer unread; a worker reads at once
TIMEVAL = Struct("@ll")  # seconds and microseconds
PEER = Struct("3i")  # process, user and group at the other end of a Unix socket


class Listener:
    """Listens for a server's workers.

    Args:
        host: the server.
        push_format: layout of the pushes that the partition accepts.
        num_parameters: values of the whole weights.
        part: slice of the weights that the partition holds.
        published: the server's weights in shared memory; None: they are not in shared memory, and the server must not
            listen on a Unix socket.

    Attributes:
        key: secret that workers prove to have in the handshake.
        path: name of the Unix socket; None: there is none.
        port: port of the network socket; None: there is none.
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
        self._closing = Event()
        self._lock = Lock()  # guards `_streams`
        self._sockets: list[socket.socket] = []  # listening
        self._streams: set[socket.socket] = set()  # of the open connections
        self._threads: set[Thread] = set()
        self._log = LimitedLog()

    def listen_unix(self) -> None:
        """Listen on a Unix socket in Linux' abstract namespace: it has no file that could be left behind.

        Raises:
            ListenError: the system provides no Unix socket.
        """
        path = f"psgd-{secrets.token_hex(8)}"
        try:
            self._listen(socket.AF_UNIX, "\0" + path, shared=True)
        except OSError as error:
            raise ListenError(f"cannot listen on a Unix socket: {error}") from error
        self.path = path

    def listen_tcp(self, host: str, ports: tuple[int, int] | None) -> None:
        """Listen on one port of this machine.

        Args:
            host: address of this machine.
            ports: first and last allowed port; None: the kernel chooses one.

        Raises:
            ListenError: no allowed port is free, or `host` is not an address of this machine.
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
            if family == socket.AF_INET:  # the kernel keeps connections of an earlier server for a minute
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
        """Return the address that workers need, with the key.

        Args:
            node: Ray's id of this node.
            host: network address of this machine.
        """
        incarnation = self._host.server.version.incarnation
        return Address(node, self.path, host, self.port, incarnation, self.key)

    def close(self) -> None:
        """Stop listening, close all connections and wait until their threads have ended."""
        with self._lock:
            self._closing.set()
            for stream in (*self._sockets, *self._streams):
                shut(stream)  # this ends the stream's thread
            threads = list(self._threads)
        for thread in threads:
            thread.join(JOIN_S)
        for listening in self._sockets:
            listening.close()
        self._log.close()

    def _start(self, name: str, work: Callable[..., None], *arguments: object) -> None:
        """Start a thread for which `close` waits.

        Raises:
            RuntimeError: the system allows no more threads.
        """

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
        handshakes = Handshakes()
        while True:
            try:
                stream = listening.accept()[0]
                if shared and (fault := _foreign_user(stream)):
                    stream.close()
                    self._log.warning("a new connection was refused: %s", fault)
                else:
                    self._start_serving(stream, shared, handshakes)
            except (OSError, RuntimeError, MemoryError) as error:  # for example, too many open files: try again later
                if self._closing.is_set():
                    return
                self._log.warning("cannot accept a worker: %s", error)
                self._closing.wait(RETRY_S)

    def _start_serving(self, stream: socket.socket, shared: bool, handshakes: Handshakes) -> None:
        handshakes.begin(stream)
        with self._lock:
            self._streams.add(stream)
            if self._closing.is_set():
                shut(stream)
            try:
                self._start("psgd-connection", self._serve, stream, shared, handshakes)
            except RuntimeError:
                handshakes.end(stream)
                self._streams.discard(stream)
                stream.close()
                raise

    def _serve(self, stream: socket.socket, shared: bool, handshakes: Handshakes) -> None:
        """Serve one connection from the handshake until it is closed."""
        try:
            self._serve_until_closed(stream, shared, handshakes)
        finally:
            self._forget(stream)

    def _serve_until_closed(self, stream: socket.socket, shared: bool, handshakes: Handshakes) -> None:
        """When this returns, nothing refers to the connection and to the worker's memory any more."""
        connection = self._admit(stream, shared, handshakes)
        if connection is not None:
            connection.run()

    def _forget(self, stream: socket.socket) -> None:
        with self._lock:
            self._streams.discard(stream)
        stream.close()

    def _admit(self, stream: socket.socket, shared: bool, handshakes: Handshakes) -> WorkerConnection | None:
        """Do the handshake and return the connection; None if it fails, for a reason that is logged."""
        try:
            return self._shake_hands(stream, shared, handshakes)
        except TimeoutError:
            self._log.warning("a new connection was closed: its handshake was not finished within %s s", HANDSHAKE_S)
        except (LaneError, OSError, RuntimeError, UnicodeDecodeError) as error:  # RuntimeError: no more threads
            self._log.warning("a new connection was closed in its handshake: %s", error)
        finally:
            handshakes.end(stream)
        return None

    def _shake_hands(self, stream: socket.socket, shared: bool, handshakes: Handshakes) -> WorkerConnection:
        handshake = HandshakeStream(stream, monotonic() + HANDSHAKE_S)
        greeting = Greeting.new()
        handshake.send(greeting.pack())
        hello = Hello.unpack(handshake.recv(HELLO_SIZE), self.key, greeting)
        handshakes.end(stream)
        self._check(hello, shared)
        welcome = hello.welcome(self.key)
        segment = None
        if shared:
            assert self._published is not None
            handshake.send_descriptor(welcome, self._published.file)
            segment = Segment(self._num_parameters, hello.slots, handshake.recv_descriptor(1)[1])
            handshake.send(b"\0")
        else:
            _keep_alive(stream)
            handshake.send(welcome)
        stream.settimeout(None)  # from here on only closing ends a wait for a frame
        frames = self._frames(stream, greeting, hello)
        return WorkerConnection(self._host, self._push_format, self._part, stream, frames, hello, segment, self._log)

    def _frames(self, stream: socket.socket, greeting: Greeting, hello: Hello) -> FrameStream:
        if hello.shared or not self._push_format.authenticates:
            return FrameStream(stream)
        to_server, to_worker = hello.frame_keys(self.key, greeting)
        tags = FrameTags(outgoing=FrameAuthenticator(to_worker), incoming=FrameAuthenticator(to_server))
        return FrameStream(stream, tags)

    def _check(self, hello: Hello, shared: bool) -> None:
        """Raise FrameError if the worker expects another server or another layout of its memory."""
        expected = (self._host.server.version.incarnation, self._num_parameters, shared)
        if (hello.incarnation, hello.num_parameters, hello.shared) != expected or not 0 < hello.slots <= MAX_SLOTS:
            raise FrameError(
                f"{hello.worker} has (incarnation, values, shared) = "
                f"{(hello.incarnation, hello.num_parameters, hello.shared)}, expected {expected}; its number of slots "
                f"is {hello.slots}, expected 1 to {MAX_SLOTS}"
            )


def _foreign_user(stream: socket.socket) -> str:
    """Return the reason if another user's process is at the other end of a Unix socket, else an empty text."""
    process, user, _ = PEER.unpack(stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))
    ours = os.geteuid()
    return "" if user == ours else f"process {process} is of user {user}, and this server is of user {ours}"


def _keep_alive(stream: socket.socket) -> None:
    """Send small messages without delay, limit each wait for the worker to read, and notice if its machine is gone."""
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, TIMEVAL.pack(SEND_S, 0))
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", SILENCE_S), ("TCP_KEEPINTVL", SILENCE_S), ("TCP_KEEPCNT", PROBES)):
        if hasattr(socket, option):
            stream.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
