"""The server's end of one worker's connection: it receives the worker's frames and sends the answers.

Each worker has a thread in the server. As long as pushes are of the usual case, the thread stays in compiled code, if
the server has a compiled push path. Other frames are served in Python, where `ServerHost` lets only one thread at a
time call the server.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from errno import EINTR
from functools import partial
from queue import SimpleQueue
from threading import Condition, Lock, Thread
from typing import TYPE_CHECKING, Protocol

import numpy as np

from psgd.errors import PushRefusedError
from psgd.serving.host import ServerHost
from psgd.serving.limited_log import LimitedLog
from psgd_workers.errors import FrameError
from psgd_workers.messages import FloatArray, Receipt, Version
from psgd_workers.transport.frame_stream import FrameStream
from psgd_workers.transport.frames import Frame, FrameKind, PushFormat, pack_receipt
from psgd_workers.transport.handshake import Hello
from psgd_workers.transport.memory import Segment, Slot
from psgd_workers.transport.streams import shut

if TYPE_CHECKING:
    from psgd.serving.compiled.path import CompiledConnection

__all__ = ["WorkerConnection"]

log = logging.getLogger("psgd.lanes")

PUSH = FrameKind.PUSH  # bound once: in Python 3.11, access through the enum takes 80 ns
ALIGNMENT = 64  # bytes; the payload of each slot begins at a multiple of it
UNREAD = "the worker sends requests but does not read the answers"


class WorkerConnection:
    """A connection to one worker. Only one thread may receive from it; any thread may answer.

    Args:
        host: the server.
        push_format: layout of the pushes that the partition accepts.
        part: slice of the weights that the partition holds.
        stream: blocking socket, after the handshake.
        frames: the frames on this socket.
        hello: the worker's message of the handshake.
        segment: the worker's memory; None: it is not shared.
        warnings: log for the reason why the connection is closed.
    """

    def __init__(
        self,
        host: ServerHost,
        push_format: PushFormat,
        part: slice,
        stream: socket.socket,
        frames: FrameStream,
        hello: Hello,
        segment: Segment | None,
        warnings: LimitedLog,
    ) -> None:
        self._host = host
        self._push_format = push_format
        self._stream = stream
        self._warnings = warnings
        self._worker = hello.worker
        self._incarnation = host.server.version.incarnation
        self._segment = segment
        self._shared = [Slot(slot.weights[part], slot.gradient[part]) for slot in segment.slots] if segment else None
        self._part = part
        # One buffer for each slot: it holds the payload of the slot's push, and later the weights of the answer.
        self._sizes = push_format.sizes(segment is not None)
        size = max(self._sizes[-1], 0 if segment else 4 * push_format.size)
        self._payloads = np.empty((hello.slots, -(-size // ALIGNMENT) * ALIGNMENT), np.uint8)
        self._inline = [payload.data for payload in self._payloads]
        self._busy = [False] * hello.slots  # True for a slot whose push has no receipt yet
        self._frames = frames
        self._answers: _Answers = _DirectAnswers(stream) if segment else _QueuedAnswers(frames, stream)
        self._compiled: CompiledConnection | None = None
        # With one server and one batch in hand, the worker waits after each push, and its processor is free.
        self._worker_waits = segment is not None and hello.slots == 1 and push_format.size == hello.num_parameters

    def run(self) -> None:
        """Serve frames until the connection is closed. The calling thread must serve only this connection."""
        while self.serve_frame():
            pass

    def serve_frame(self) -> bool:
        """Wait for a frame and serve it. Pushes that compiled code applies before are served as well.

        Returns:
            False if the connection is closed now. If something was wrong, the log says what. A push without a receipt
            stays in the server's state.
        """
        try:
            received = self._receive()
            if received is not None:
                self._serve(*received)
                return True
            if self._answers.fault:
                self._log_closed(self._answers.fault)
        except BlockingIOError:
            self._log_closed(UNREAD)
        except (FrameError, PushRefusedError, OSError) as error:
            self._log_closed(self._answers.fault or str(error))
        except Exception:  # a fault of the server: close the connection, so that the worker does not wait in vain
            log.exception("the connection of %s was closed because of a fault in the server", self._worker)
        self._close()
        return False

    def _receive(self) -> tuple[Frame, memoryview] | None:
        """Serve pushes in compiled code, if possible, and return the first frame that it leaves to Python.

        Returns:
            Header and payload; None if the connection is closed.
        """
        compiled = self._enter_compiled()
        if compiled is None or not compiled.receives:
            return self._frames.receive(self._accept)
        while True:
            stop = compiled.serve()
            if stop.error not in (0, EINTR):
                raise OSError(stop.error, os.strerror(stop.error))
            if not stop.is_unsent:
                return self._frames.receive(self._accept, stop.header_got, stop.payload_got)
            self._stream.sendall(stop.unsent)

    def _enter_compiled(self) -> CompiledConnection | None:
        """Return this connection's end of the compiled push path; None if Python has to serve the next push.

        Compiled code sends its answers itself. So no other answer may be under way, or become due meanwhile.
        """
        path = self._host.compiled
        if path is None:
            return None
        if not path.applies:
            if self._compiled is not None:
                self._compiled.stop_following()  # in Python, it may wait for the worker of another thread
            return None
        if any(self._busy):
            return None
        self._answers.wait_until_sent()
        if self._compiled is None:
            segment = self._segment
            self._compiled = path.connection(
                self._worker,
                self._stream.fileno(),
                np.frombuffer(self._frames.head, np.uint8),
                self._frames.tags,
                self._payloads,
                None if segment is None else (segment.values, *segment.starts(self._part.start)),
                self._worker_waits,
            )
        return self._compiled

    def _close(self) -> None:
        shut(self._stream)
        self._answers.close()

    def _log_closed(self, why: str) -> None:
        self._warnings.warning("the connection of %s was closed: %s", self._worker, why)

    def _accept(self, frame: Frame) -> memoryview:
        """Check a header, and return the buffer for the payload."""
        self._check(frame)
        return self._inline[frame.slot][: frame.payload]

    def _check(self, frame: Frame) -> None:
        """Raise FrameError if no worker of this server would send such a header now."""
        if frame.incarnation != self._incarnation:
            raise FrameError(f"a frame is for incarnation {frame.incarnation}, and this server is {self._incarnation}")
        kind = frame.kind
        if frame.slot >= len(self._busy) or (self._busy[frame.slot] and kind is not FrameKind.ASK):
            raise FrameError(f"a frame is from slot {frame.slot}, which does not exist or still waits for a receipt")
        if self._answers.backlog > len(self._busy) + 1:  # one answer for each slot, and one version
            raise FrameError(UNREAD)
        if kind is PUSH:
            self._push_format.check(frame, self._sizes)
        elif kind not in (FrameKind.PULL, FrameKind.ASK) or frame.payload:
            raise FrameError(f"no worker sends a frame {frame.kind.name} with {frame.payload} bytes of payload")

    def _serve(self, frame: Frame, payload: memoryview) -> None:
        slot = frame.slot
        host = self._host
        if frame.kind is PUSH:
            shared = self._shared[slot] if self._shared else None
            if self._take():
                return
            gradient = self._push_format.gradient(frame, payload, self._worker, shared)
            self._busy[slot] = True
            host.push(gradient, partial(self._answer_push, slot, frame.wants))
        elif frame.kind is FrameKind.PULL:
            into, weights = self._weights_buffer(slot)
            self._answers.expect()
            self._answers.put(_header(FrameKind.WEIGHTS, slot, host.pull(into), _length(weights)), weights)
        else:
            self._answers.expect()
            self._answers.put(_header(FrameKind.VERSION, slot, host.server.version, 0), None)

    def _take(self) -> bool:
        """Let compiled code apply a push that only Python could receive, and answer it. Return False if it was not."""
        if not self._frames.tags or (compiled := self._enter_compiled()) is None or compiled.receives:
            return False
        if not compiled.take():
            return False
        self._frames.send(*compiled.answer())
        return True

    def _answer_push(self, slot: int, wants: bool, receipt: Receipt) -> Callable[[], None]:
        """Prepare the answer to a push, with the current weights if wanted, and return the function that sends it."""
        self._answers.expect()
        self._busy[slot] = False
        weights = None
        if wants:
            into, weights = self._weights_buffer(slot)
            np.copyto(into, self._host.server.published)
        return partial(self._answers.put, pack_receipt(receipt, slot, wants, _length(weights)), weights)

    def _weights_buffer(self, slot: int) -> tuple[FloatArray, memoryview | None]:
        """Return the vector for the weights of a slot, and the bytes of it to send; None if the vector is shared."""
        if self._shared:
            return self._shared[slot].weights, None
        payload = self._inline[slot][: 4 * self._push_format.size]
        return np.frombuffer(payload, np.float32), payload


class _Answers(Protocol):
    """Sends the answers to one worker. Any thread may call it."""

    fault: str  # reason why sending has failed, after which the socket is shut down; "": it has not failed

    @property
    def backlog(self) -> int:
        """Return the number of answers that are not sent yet."""

    def expect(self) -> None:
        """Announce an answer, which `put` will send."""

    def put(self, header: bytes, weights: memoryview | None) -> None:
        """Send an announced answer, now or later, without waiting for the worker."""

    def wait_until_sent(self) -> None:
        """Wait until all announced answers are sent, or sending has failed."""

    def close(self) -> None:
        """Send no more. The caller may close the socket afterwards."""


class _DirectAnswers:
    """Sends answers without weights, each in the calling thread.

    If the worker reads its answers, the socket's buffer always has room for another header, so sending never waits.
    """

    backlog = 0

    def __init__(self, stream: socket.socket) -> None:
        self.fault = ""  # text, because an exception's traceback would keep the worker's memory alive
        self._stream = stream
        self._lock = Lock()  # so that nothing is sent after `close`, when the kernel may reuse the socket's number
        self._open = True

    def expect(self) -> None:
        """No-op: the kernel sends a header as a whole, so other threads may send meanwhile."""

    def put(self, header: bytes, weights: memoryview | None) -> None:
        assert weights is None, "weights are written to the worker's memory"
        with self._lock:
            if not self._open or self.fault:
                return
            try:
                self._stream.send(header, socket.MSG_DONTWAIT)
            except BlockingIOError:
                self.fault = UNREAD
            except OSError as error:
                self.fault = str(error)
            if self.fault:
                shut(self._stream)

    def wait_until_sent(self) -> None:
        """No-op: see `expect`."""

    def close(self) -> None:
        with self._lock:
            self._open = False


class _QueuedAnswers:
    """Sends answers with weights, in a thread of its own, as fast as the worker reads them."""

    def __init__(self, frames: FrameStream, stream: socket.socket) -> None:
        self.fault = ""  # text, because an exception's traceback would keep the worker's memory alive
        self._frames = frames
        self._stream = stream
        self._queue = SimpleQueue[tuple[bytes, memoryview | None] | None]()
        self._all_sent = Condition()  # guards `_unsent`
        self._unsent = 0
        self._thread = Thread(target=self._send, name="psgd-answers", daemon=True)
        self._thread.start()

    @property
    def backlog(self) -> int:
        return self._unsent

    def expect(self) -> None:
        with self._all_sent:
            self._unsent += 1

    def put(self, header: bytes, weights: memoryview | None) -> None:
        self._queue.put((header, weights))

    def wait_until_sent(self) -> None:
        with self._all_sent:
            self._all_sent.wait_for(lambda: not self._unsent or self.fault)

    def _send(self) -> None:
        try:
            while answer := self._queue.get():
                header, weights = answer
                self._frames.send(header, *(() if weights is None else (weights,)))
                with self._all_sent:
                    self._unsent -= 1
                    self._all_sent.notify_all()
        except BlockingIOError:
            self._fail(UNREAD)
        except (OSError, MemoryError) as error:
            self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, fault: str) -> None:
        with self._all_sent:
            self.fault = fault
            self._all_sent.notify_all()
        shut(self._stream)

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()


def _header(kind: FrameKind, slot: int, version: Version, payload: int) -> bytes:
    return Frame(kind, slot, 0, False, version.incarnation, payload, version=version).pack()


def _length(weights: memoryview | None) -> int:
    return 0 if weights is None else len(weights)
