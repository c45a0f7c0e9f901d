"""The server's end of one worker's connection: a thread that takes its frames, and how it is answered.

Each worker has a thread here, instead of all of them one loop, and that thread follows its worker from core to core:
with one server and one batch in hand, it has work just when its worker has none. A loop runs where it ran last, beside
another worker that computes, while the core of the one that waits for it idles; so does, often, a thread that is left
to the kernel. `ServerHost` lets one thread at a time touch the server.
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
from psgd_workers.errors import FrameError
from psgd_workers.messages import FloatArray, Receipt, Version
from psgd_workers.transport.affinity import NOWHERE, allowed_processors, run_on
from psgd_workers.transport.frames import HEADER_SIZE, Frame, FrameKind, PushFormat
from psgd_workers.transport.handshake import Hello
from psgd_workers.transport.memory import Segment, Slot
from psgd_workers.transport.streams import receive, send, shut

__all__ = ["WorkerConnection"]

log = logging.getLogger("psgd.lanes")

SETTLED = 8  # pushes in a row from one processor, after which a worker is taken to stay there
CUT = "it hung up in the middle of a frame"
GREEDY = "it asks for more and does not read what it is answered"


class WorkerConnection:
    """One worker's connection.

    Args:
        host: of its server.
        form: of its pushes.
        part: the partition's slice of the weights.
        stream: after the handshake; blocking.
        hello: who it is.
        segment: its memory, if that is shared.

    Attributes:
        frame_s: that the rest of a frame may take, once it has begun to come; None: any time.
    """

    def __init__(
        self,
        host: ServerHost,
        push_format: PushFormat,
        part: slice,
        stream: socket.socket,
        hello: Hello,
        segment: Segment | None,
    ) -> None:
        self._host = host
        self._push_format = push_format
        self._stream = stream
        self._worker = hello.worker
        self._incarnation = host.server.version.incarnation
        self._shared = [Slot(slot.weights[part], slot.gradient[part]) for slot in segment.slots] if segment else None
        # What comes inline for a slot, and later the weights that go back: never both at once.
        self._sizes = push_format.sizes(segment is not None)
        limit = max(self._sizes[-1], 0 if segment else 4 * push_format.size)
        self._inline = [np.empty(limit, np.uint8).data for _ in range(hello.slots)]
        self._busy = [False] * hello.slots  # a push whose receipt is not given
        # With one server and one batch in hand, a worker that has pushed leaves its processor to that server.
        self._leaves = hello.slots == 1 and push_format.size == hello.num_parameters
        self._seen, self._times = NOWHERE, 0  # the processor that the last push came from, and how often in a row
        self._header = memoryview(bytearray(HEADER_SIZE))
        self.frame_s: float | None = None
        self._answers: _Answers = (_Direct if segment else _Queued)(stream)

    def run(self, is_full: Callable[[], bool]) -> None:
        """Take frames until either end hangs up, on the worker's processor; to be called by a thread of its own.

        Args:
            is_full: whether every processor has a worker. Where one is free, it had better do what can be done beside
                the worker: its next batch, or another server's work.
        """
        everywhere = allowed_processors()
        here = NOWHERE
        while self.take():
            # A worker that goes from one to the next is not followed: to move costs more than a few pushes gain.
            stays = self._times >= SETTLED and self._seen in everywhere and (self._leaves or is_full())
            if (there := self._seen if stays else NOWHERE) != here:
                run_on({there} if stays else everywhere)
                here = there

    def take(self) -> bool:
        """Wait for a frame and take it; false: either end has hung up, and whatever was wrong is in the log.

        A push whose receipt is not given then stays where it is.
        """
        try:
            if self._next():
                return True
            if self._answers.fault:
                self._say(self._answers.fault)
        except (FrameError, PushRefusedError, OSError) as error:
            self._say(str(error))
        except Exception:  # our own: its worker need not wait for what never comes, nor the others of its crowd
            log.exception("the connection of %s was closed by the server's own fault", self._worker)
        shut(self._stream)
        self._answers.close()
        return False

    def _say(self, why: str) -> None:
        log.warning("the connection of %s was closed: %s", self._worker, why)

    def _next(self) -> bool:
        """Take one frame; false: there is none any more."""
        got = receive(self._stream, self._header, self.frame_s)
        if not got:
            return False
        if got < HEADER_SIZE:
            raise FrameError(CUT)
        frame = Frame.unpack(self._header)
        self._check(frame)
        payload = self._inline[frame.slot][: frame.payload]
        if frame.payload and receive(self._stream, payload, self.frame_s) < frame.payload:
            raise FrameError(CUT)
        self._take(frame, payload)
        return True

    def _check(self, frame: Frame) -> None:
        if frame.incarnation != self._incarnation:
            raise FrameError(f"a frame for incarnation {frame.incarnation}, and this is {self._incarnation}")
        if frame.slot >= len(self._busy) or (self._busy[frame.slot] and frame.kind is not FrameKind.ASK):
            raise FrameError(f"a frame from slot {frame.slot}, which does not exist, or whose receipt is not given")
        if self._answers.backlog > len(self._busy) + 1:  # an answer for each slot, and a version
            raise FrameError(GREEDY)
        if frame.kind is FrameKind.PUSH:
            self._push_format.check(frame, self._sizes)
        elif frame.kind not in (FrameKind.PULL, FrameKind.ASK) or frame.payload:
            raise FrameError(f"a frame {frame.kind.name} with {frame.payload} bytes of payload, which no worker sends")

    def _take(self, frame: Frame, payload: memoryview) -> None:
        slot = frame.slot
        host = self._host
        match frame.kind:
            case FrameKind.PUSH:
                shared = self._shared[slot] if self._shared else None
                gradient = self._push_format.gradient(frame, payload, self._worker, shared)
                self._busy[slot] = True
                self._times = self._times + 1 if frame.processor == self._seen else 1
                self._seen = frame.processor
                host.push(gradient, partial(self._receipt, slot, frame.wants))
            case FrameKind.PULL:
                into, weights = self._room(slot)
                self._answers.put(_header(FrameKind.WEIGHTS, slot, host.pull(into), _length(weights)), weights)
            case _:
                self._answers.put(_header(FrameKind.VERSION, slot, host.server.version, 0), None)

    def _receipt(self, slot: int, wants: bool, receipt: Receipt) -> Callable[[], None]:
        """Prepare the answer to a push, at the instant it is due."""
        self._busy[slot] = False
        weights = None
        if wants:
            into, weights = self._room(slot)
            np.copyto(into, self._host.server.published)
        header = Frame.of_receipt(receipt, slot, wants, _length(weights)).pack()
        return partial(self._answers.put, header, weights)

    def _room(self, slot: int) -> tuple[FloatArray, memoryview | None]:
        """Where weights for the worker are put, and what of that is sent: nothing, in memory that it shares."""
        if self._shared:
            return self._shared[slot].weights, None
        payload = self._inline[slot][: 4 * self._push_format.size]
        return np.frombuffer(payload, np.float32), payload


class _Answers(Protocol):
    """What goes back to a worker, from any thread."""

    fault: str  # why nothing does any more: `run` is to end

    @property
    def backlog(self) -> int:
        """Answers that are not sent."""

    def put(self, header: bytes, weights: memoryview | None) -> None:
        """Send an answer, now or later, without waiting for the worker."""

    def close(self) -> None:
        """Nothing is sent any more."""


class _Direct:
    """Answers of a header each: a socket whose reader reads takes them at once."""

    backlog = 0

    def __init__(self, stream: socket.socket) -> None:
        self.fault = ""  # an exception would keep alive what its traceback passed, a worker's memory included
        self._stream = stream
        self._lock = Lock()  # a closed socket's number may be another's
        self._open = True

    def put(self, header: bytes, weights: memoryview | None) -> None:
        assert weights is None, "they are in the worker's memory"
        with self._lock:
            if not self._open:
                return
            try:
                self._stream.send(header, socket.MSG_DONTWAIT)
            except BlockingIOError:
                self.fault = GREEDY
            except OSError as error:
                self.fault = str(error)
            if self.fault:
                shut(self._stream)

    def close(self) -> None:
        with self._lock:
            self._open = False


class _Queued:
    """Answers that bring weights: a thread sends them as fast as they are read."""

    def __init__(self, stream: socket.socket) -> None:
        self.fault = ""  # an exception would keep alive what its traceback passed, a worker's memory included
        self._stream = stream
        self._queue = SimpleQueue[tuple[bytes | memoryview, ...]]()
        self._thread = Thread(target=self._send, name="psgd-answers", daemon=True)
        self._thread.start()

    @property
    def backlog(self) -> int:
        return self._queue.qsize()

    def put(self, header: bytes, weights: memoryview | None) -> None:
        self._queue.put((header,) if weights is None else (header, weights))

    def _send(self) -> None:
        try:
            while parts := self._queue.get():
                send(self._stream, *parts)
        except (OSError, MemoryError) as error:
            self.fault = f"{type(error).__name__}: {error}"
            shut(self._stream)

    def close(self) -> None:
        self._queue.put(())
        self._thread.join()


def _header(kind: FrameKind, slot: int, version: Version, payload: int) -> bytes:
    return Frame(kind, slot, 0, False, version.incarnation, payload, version=version).pack()


def _length(weights: memoryview | None) -> int:
    return 0 if weights is None else len(weights)
