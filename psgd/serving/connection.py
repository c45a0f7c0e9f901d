"""The server's end of one worker's connection: it receives the worker's frames and sends the answers.

Each worker has a thread in the server, except the workers that a `SharedPoller` serves. The thread of a worker on the
same machine follows the worker to its processor, which is idle while the worker waits for its receipt. Left to itself,
the kernel often runs a thread where it ran last, beside another worker that computes. `ServerHost` lets only one thread
at a time call the server.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Protocol

import numpy as np

from psgd.errors import PushRefusedError
from psgd.serving.host import ServerHost
from psgd.serving.limited_log import LimitedLog
from psgd_workers.errors import FrameError
from psgd_workers.messages import FloatArray, Receipt, Version
from psgd_workers.transport.affinity import NOWHERE, allowed_processors, run_on
from psgd_workers.transport.frame_stream import Accept, FrameStream
from psgd_workers.transport.frames import Frame, FrameKind, PushFormat, pack_receipt
from psgd_workers.transport.handshake import Hello
from psgd_workers.transport.memory import Segment, Slot
from psgd_workers.transport.streams import shut

__all__ = ["WorkerConnection"]

log = logging.getLogger("psgd.lanes")

PUSH = FrameKind.PUSH  # bound once: in Python 3.11, access through the enum takes 80 ns
SETTLED = 8  # pushes in a row from one processor, after which the worker is assumed to stay there
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
        self._shared = [Slot(slot.weights[part], slot.gradient[part]) for slot in segment.slots] if segment else None
        # One buffer for each slot: it holds the payload of the slot's push, and later the weights of the answer.
        self._sizes = push_format.sizes(segment is not None)
        limit = max(self._sizes[-1], 0 if segment else 4 * push_format.size)
        self._inline = [np.empty(limit, np.uint8).data for _ in range(hello.slots)]
        self._busy = [False] * hello.slots  # True for a slot whose push has no receipt yet
        # With one server and one batch in hand, the worker waits after each push, and its processor is free.
        self._worker_waits = hello.slots == 1 and push_format.size == hello.num_parameters
        self._processor = NOWHERE  # from which the last push came
        self._num_pushes_there = 0  # pushes in a row from that processor
        self._frames = frames
        self._answers: _Answers = _DirectAnswers(stream) if segment else _QueuedAnswers(frames, stream)

    def run(self, is_machine_full: Callable[[], bool]) -> None:
        """Serve frames until the connection is closed. The calling thread must serve only this connection.

        The thread moves to the worker's processor if the worker waits for its receipts there, or if no other processor
        is free.

        Args:
            is_machine_full: returns True if every processor of this machine has a worker.
        """
        everywhere = allowed_processors()
        here = NOWHERE
        while self.serve_frame():
            # A worker that often changes its processor is not followed: each move costs more than a few pushes gain.
            is_settled = self._num_pushes_there >= SETTLED and self._processor in everywhere
            follows = is_settled and (self._worker_waits or is_machine_full())
            if (there := self._processor if follows else NOWHERE) != here:
                run_on({there} if follows else everywhere)
                here = there

    def serve_frame(self) -> bool:
        """Wait for one frame and serve it.

        Returns:
            False if the connection is closed now. If something was wrong, the log says what. A push without a receipt
            stays in the server's state.
        """
        return self._serve_received(self._frames.receive)

    def serve_part(self) -> bool:
        """Receive what has arrived of a frame without waiting. Serve the frame if it is whole; see `serve_frame`."""
        return self._serve_received(self._frames.receive_part)

    def drop(self, why: str) -> None:
        """Close the connection, and log the reason."""
        self._log_closed(why)
        self._close()

    @property
    def part_since(self) -> float:
        """Monotonic time since which the rest of a frame is awaited; infinity if none is."""
        return self._frames.part_since

    def _serve_received(self, receive: Callable[[Accept], tuple[Frame, memoryview] | None]) -> bool:
        try:
            received = receive(self._accept)
            if received is not None:
                self._serve(*received)
                return True
            if not self._frames.is_closed:
                return True
            if self._answers.fault:
                self._log_closed(self._answers.fault)
        except (FrameError, PushRefusedError, OSError) as error:
            self._log_closed(str(error))
        except Exception:  # a fault of the server: close the connection, so that the worker does not wait in vain
            log.exception("the connection of %s was closed because of a fault in the server", self._worker)
        self._close()
        return False

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
            gradient = self._push_format.gradient(frame, payload, self._worker, shared)
            self._busy[slot] = True
            self._num_pushes_there = self._num_pushes_there + 1 if frame.processor == self._processor else 1
            self._processor = frame.processor
            host.push(gradient, partial(self._answer_push, slot, frame.wants))
        elif frame.kind is FrameKind.PULL:
            into, weights = self._weights_buffer(slot)
            self._answers.put(_header(FrameKind.WEIGHTS, slot, host.pull(into), _length(weights)), weights)
        else:
            self._answers.put(_header(FrameKind.VERSION, slot, host.server.version, 0), None)

    def _answer_push(self, slot: int, wants: bool, receipt: Receipt) -> Callable[[], None]:
        """Prepare the answer to a push, with the current weights if wanted, and return the function that sends it."""
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
        """Return the number of answers that wait to be sent."""

    def put(self, header: bytes, weights: memoryview | None) -> None:
        """Send an answer, now or later, without waiting for the worker."""

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

    def put(self, header: bytes, weights: memoryview | None) -> None:
        assert weights is None, "weights are written to the worker's memory"
        with self._lock:
            if not self._open:
                return
            try:
                self._stream.send(header, socket.MSG_DONTWAIT)
            except BlockingIOError:
                self.fault = UNREAD
            except OSError as error:
                self.fault = str(error)
            if self.fault:
                shut(self._stream)

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
        self._thread = Thread(target=self._send, name="psgd-answers", daemon=True)
        self._thread.start()

    @property
    def backlog(self) -> int:
        return self._queue.qsize()

    def put(self, header: bytes, weights: memoryview | None) -> None:
        self._queue.put((header, weights))

    def _send(self) -> None:
        try:
            while answer := self._queue.get():
                header, weights = answer
                self._frames.send(header, *(() if weights is None else (weights,)))
        except (OSError, MemoryError) as error:
            self.fault = f"{type(error).__name__}: {error}"
            shut(self._stream)

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()


def _header(kind: FrameKind, slot: int, version: Version, payload: int) -> bytes:
    return Frame(kind, slot, 0, False, version.incarnation, payload, version=version).pack()


def _length(weights: memoryview | None) -> int:
    return 0 if weights is None else len(weights)
