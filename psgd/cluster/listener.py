"""The server's end of the shm and tcp lanes: sockets on the event loop that its host runs on.

Nothing here waits for a peer: who is silent in the handshake is dropped after a moment, who sends what is no frame of
this job is dropped at once, with a line in the log, and who does not read is sent no more than it was promised.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import secrets
import socket
from collections import deque
from collections.abc import Coroutine
from functools import partial
from typing import Any

import numpy as np

from psgd.cluster.host import ServerHost
from psgd.errors import LaneError
from psgd_workers.frames import HEADER_SIZE, Frame, Kind, PushForm
from psgd_workers.handshake import HELLO_SIZE, KEY_SIZE, Address, Greeting, Hello
from psgd_workers.memory import PublishedVector, Segment, Slot
from psgd_workers.messages import Receipt

__all__ = ["Listener"]

HANDSHAKE_S = 5.0
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
        self, host: ServerHost, form: PushForm, num_parameters: int, part: slice, published: PublishedVector | None
    ) -> None:
        self.host = host
        self.form = form
        self.num_parameters = num_parameters
        self.part = part
        self.published = published
        self.key = secrets.token_bytes(KEY_SIZE)
        self.path: str | None = None
        self.port: int | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._sockets: list[socket.socket] = []
        self._peers: set[_Peer] = set()

    def listen_unix(self) -> None:
        """On a Unix socket in Linux' abstract namespace: it has no file, so none is left behind."""
        self.path = f"psgd-{secrets.token_hex(8)}"
        self._listen(socket.AF_UNIX, "\0" + self.path, shared=True)

    def listen_tcp(self, host: str, ports: tuple[int, int] | None) -> None:
        """On one port of this machine.

        Args:
            host: the machine's own address.
            ports: first and last of those allowed; None: any.

        Raises:
            LaneError: none of them is free, or the address is not this machine's.
        """
        first, last = ports or (0, 0)
        for port in range(first, last + 1):
            try:
                self.port = self._listen(socket.AF_INET, (host, port), shared=False).getsockname()[1]
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise LaneError(f"cannot listen on {host}:{port}: {error}") from error
            else:
                return
        raise LaneError(f"no port from {first} to {last} is free on {host}: widen scaling.ports, or leave it out")

    def _listen(self, family: int, to: str | tuple[str, int], shared: bool) -> socket.socket:
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            if family == socket.AF_INET:  # a predecessor's connections may linger on the port for a minute
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(to)
            listening.listen(BACKLOG)
        except OSError:
            listening.close()
            raise
        listening.setblocking(False)
        self._sockets.append(listening)
        self._start(self._accept(listening, shared))
        return listening

    def address(self, node: str, host: str) -> Address:
        """What workers are told."""
        incarnation = self.host.server.version.incarnation
        return Address(node, self.path, host, self.port, incarnation, self.key)

    def close(self) -> None:
        """Hang up on everybody, and listen no more."""
        for task in self._tasks:
            task.cancel()
        for listening in self._sockets:
            listening.close()
        for peer in list(self._peers):
            peer.close()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listening: socket.socket, shared: bool) -> None:
        loop, handshakes = asyncio.get_running_loop(), asyncio.Semaphore(HANDSHAKES)
        while True:
            await handshakes.acquire()
            try:
                stream, _ = await loop.sock_accept(listening)
            except OSError as error:  # too many open files, say: the peer waits, and may have more luck later
                handshakes.release()
                log.warning("cannot accept a worker: %s", error)
                await asyncio.sleep(RETRY_S)
                continue
            stream.setblocking(False)
            self._start(self._receive(stream, shared, handshakes))

    async def _receive(self, stream: socket.socket, shared: bool, handshakes: asyncio.Semaphore) -> None:
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                peer = await self._shake_hands(stream, shared)
            self._peers.add(peer)
            peer.start()
        except TimeoutError:
            log.warning("a peer was dropped: it did not finish its handshake within %s s", HANDSHAKE_S)
            stream.close()
        except (LaneError, OSError, UnicodeDecodeError) as error:
            log.warning("a peer was dropped in its handshake: %s", error)
            stream.close()
        except BaseException:
            stream.close()
            raise
        finally:
            handshakes.release()

    async def _shake_hands(self, stream: socket.socket, shared: bool) -> _Peer:
        loop, greeting = asyncio.get_running_loop(), Greeting.new()
        await loop.sock_sendall(stream, greeting.pack())
        hello = Hello.unpack(await _exactly(stream, HELLO_SIZE), self.key, greeting)
        self._check(hello, shared)
        if not shared:
            _keep_alive(stream)
            await loop.sock_sendall(stream, hello.welcome(self.key))
            return _Peer(self, stream, hello, None)
        assert self.published is not None
        socket.send_fds(stream, [hello.welcome(self.key)], [self.published.file])
        segment = Segment(self.num_parameters, hello.slots, await _descriptor(stream))
        await loop.sock_sendall(stream, b"\0")
        return _Peer(self, stream, hello, segment)

    def _check(self, hello: Hello, shared: bool) -> None:
        expected = (self.host.server.version.incarnation, self.num_parameters, shared)
        if (hello.incarnation, hello.num_parameters, hello.shared) != expected or not 0 < hello.slots <= MAX_SLOTS:
            raise LaneError(
                f"{hello.worker} expects incarnation, values, sharing {hello.incarnation}, {hello.num_parameters}, "
                f"{hello.shared} in {hello.slots} slots; here they are {expected}, and slots 1 to {MAX_SLOTS}"
            )

    def forget(self, peer: _Peer) -> None:
        """It has hung up."""
        self._peers.discard(peer)


class _Peer:
    """One worker's connection.

    Args:
        listener: that accepted it.
        stream: non-blocking.
        hello: who it is.
        segment: its memory, if that is shared.
    """

    def __init__(self, listener: Listener, stream: socket.socket, hello: Hello, segment: Segment | None) -> None:
        self._listener = listener
        self._host = listener.host
        self._form = listener.form
        self._stream = stream
        self._worker = hello.worker
        self._loop = asyncio.get_running_loop()
        part = listener.part
        self._shared = [Slot(slot.weights[part], slot.gradient[part]) for slot in segment.slots] if segment else None
        # What comes inline for a slot, and later the weights that go back: never both at once.
        limit = max(listener.form.limit(segment is not None), 0 if segment else 4 * listener.form.size)
        self._inline = [np.empty(limit, np.uint8).data for _ in range(hello.slots)]
        self._busy = [False] * hello.slots  # a push whose receipt is not given
        self._header = memoryview(bytearray(HEADER_SIZE))
        self._frame: Frame | None = None  # whose payload is coming
        self._into = self._header
        self._got = 0
        self._out: deque[memoryview] = deque()
        self._closed = False

    def start(self) -> None:
        """Take frames from now on."""
        self._loop.add_reader(self._stream, self._readable)

    def close(self, why: Exception | None = None) -> None:
        """Hang up; a push whose receipt is not given stays where it is, and its worker is told nothing."""
        if self._closed:
            return
        if why is not None:
            log.warning("the connection of %s was closed: %s", self._worker, why)
        self._closed = True
        self._loop.remove_reader(self._stream)
        self._loop.remove_writer(self._stream)
        self._stream.close()
        self._out.clear()
        self._listener.forget(self)

    def _readable(self) -> None:
        try:
            got = self._stream.recv_into(self._into[self._got :])
            self._got += got
            if self._got == len(self._into):
                self._complete()
            elif not got:
                self.close(LaneError("it hung up in the middle of a frame") if self._got else None)
        except BlockingIOError:
            return
        except (LaneError, OSError) as error:
            self.close(error)
        except Exception as error:  # our own: its worker need not wait for what never comes
            self.close(error)
            raise

    def _complete(self) -> None:
        """A header or a payload is there."""
        frame = self._frame
        if frame is None:
            frame = Frame.unpack(self._header)
            self._check(frame)
            if frame.payload:
                self._frame, self._into, self._got = frame, self._inline[frame.slot][: frame.payload], 0
                return
        payload = self._into if frame.payload else self._header[:0]
        self._frame, self._into, self._got = None, self._header, 0
        self._take(frame, payload)

    def _check(self, frame: Frame) -> None:
        incarnation = self._host.server.version.incarnation
        if frame.incarnation != incarnation:
            raise LaneError(f"a frame for incarnation {frame.incarnation}, and this is {incarnation}")
        if frame.slot >= len(self._busy) or (self._busy[frame.slot] and frame.kind is not Kind.ASK):
            raise LaneError(f"a frame from slot {frame.slot}, which does not exist, or whose receipt is not given")
        if len(self._out) > 2 * len(self._busy) + 1:  # a header and weights for each slot, and a version
            raise LaneError("it asks for more and does not read what it is answered")
        if frame.kind is Kind.PUSH:
            self._form.check(frame, self._shared is not None)
        elif frame.kind not in (Kind.PULL, Kind.ASK) or frame.payload:
            raise LaneError(f"a frame {frame.kind.name} with {frame.payload} bytes of payload, which no worker sends")

    def _take(self, frame: Frame, payload: memoryview) -> None:
        slot, server = frame.slot, self._host.server
        match frame.kind:
            case Kind.PUSH:
                shared = self._shared[slot] if self._shared else None
                gradient = self._form.gradient(frame, payload, self._worker, shared)
                self._busy[slot] = True
                self._host.push(gradient, partial(self._receipt, slot, frame.wants))
            case Kind.PULL:
                weights = self._weights(slot)
                answer = Frame(Kind.WEIGHTS, slot, 0, False, server.version.incarnation, _length(weights))
                self._send(answer._replace(version=server.version), weights)
            case _:
                answer = Frame(Kind.VERSION, slot, 0, False, server.version.incarnation, 0)
                self._send(answer._replace(version=server.version), None)

    def _receipt(self, slot: int, wants: bool, receipt: Receipt) -> None:
        if self._closed:
            return
        self._busy[slot] = False
        weights = self._weights(slot) if wants else None
        self._send(Frame.of_receipt(receipt, slot, wants, _length(weights)), weights)

    def _weights(self, slot: int) -> memoryview | None:
        """Give the worker the weights as they are: into its memory, or as a payload."""
        published = self._host.server.published
        if self._shared:
            np.copyto(self._shared[slot].weights, published)
            return None
        weights = self._inline[slot][: published.nbytes]
        np.copyto(np.frombuffer(weights, np.float32), published)
        return weights

    def _send(self, frame: Frame, payload: memoryview | None) -> None:
        parts = [memoryview(frame.pack())]
        if payload is not None:
            parts.append(payload)
        if not self._out:
            try:
                sent = self._stream.sendmsg(parts)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self._loop.call_soon(self.close, error)  # not at once: the server is in the middle of its receipts
                return
            while parts and sent >= len(parts[0]):
                sent -= len(parts.pop(0))
            if not parts:
                return
            parts[0] = parts[0][sent:]
            self._loop.add_writer(self._stream, self._writable)
        self._out += parts

    def _writable(self) -> None:
        try:
            sent = self._stream.send(self._out[0])
        except BlockingIOError:
            return
        except OSError as error:
            self.close(error)
            return
        self._out[0] = self._out[0][sent:]
        if not self._out[0]:
            self._out.popleft()
        if not self._out:
            self._loop.remove_writer(self._stream)


def _keep_alive(stream: socket.socket) -> None:
    """Send small messages at once, and find out when a machine is gone that could not say so."""
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", SILENCE_S), ("TCP_KEEPINTVL", SILENCE_S), ("TCP_KEEPCNT", PROBES)):
        if hasattr(socket, option):
            stream.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _length(payload: memoryview | None) -> int:
    return 0 if payload is None else len(payload)


async def _exactly(stream: socket.socket, size: int) -> bytes:
    loop, data = asyncio.get_running_loop(), bytearray(size)
    got = 0
    while got < size:
        count = await loop.sock_recv_into(stream, memoryview(data)[got:])
        if not count:
            raise LaneError("it hung up")
        got += count
    return bytes(data)


async def _descriptor(stream: socket.socket) -> int:
    """The one file descriptor that comes with one byte."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(stream, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(stream)
    byte, files, _, _ = socket.recv_fds(stream, 1, 1)
    if len(byte) != 1 or len(files) != 1:
        for file in files:
            os.close(file)
        raise LaneError(f"it passed {len(files)} descriptors of its memory, expected 1")
    return files[0]
