"""The compiled push path of one server, and its end at each connection."""

from __future__ import annotations

import os
from collections.abc import Sequence
from socket import MSG_DONTWAIT, MSG_NOSIGNAL
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from psgd.core.server.journal import RECORD
from psgd.core.server.live_worker import LiveWorker
from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.push_arrays import INCARNATION
from psgd.serving.compiled.arrays import server_arrays, worker_arrays
from psgd.serving.compiled.gmac import GmacArrays, no_gmac
from psgd.serving.compiled.libcrypto import Libcrypto
from psgd.serving.compiled.push import HEADER, WorkerArrays
from psgd.serving.compiled.rule import write_rule
from psgd.serving.compiled.serve import (
    ERROR,
    HEADER_GOT,
    MAX_PROCESSORS,
    PAYLOAD_GOT,
    PUSHES_THERE,
    SENT,
    UNSENT,
    ConnectionArrays,
    serve,
    take_push,
)
from psgd.serving.server_lock import ServerLock
from psgd_workers.messages import FloatArray
from psgd_workers.transport.authentication import TAG_SIZE, FrameTags
from psgd_workers.transport.frames import HEADER_SIZE

__all__ = ["CompiledConnection", "CompiledPath"]

NOBODY = LiveWorker()
NOBODY.leave()
CLOSED = -1  # no socket has this descriptor


class CompiledPath:
    """The compiled push path of one server. Its code is loaded, or compiled, before this object exists.

    Args:
        server: the server.
        lock: the lock of the server.
    """

    def __init__(self, server: ParameterServer, lock: ServerLock) -> None:
        self._server = server
        self.arrays = server_arrays(server, lock.mutex, lock.fault)
        self.refresh()
        self._libcrypto = Libcrypto.find()
        head = np.zeros(HEADER_SIZE, np.uint8)
        payloads = np.zeros((1, 0), np.uint8)
        unused = self.connection("", CLOSED, head, None, payloads, (np.empty(0, np.float32), [0], [0]), False)
        unused.serve()
        unused.take()

    def refresh(self) -> None:
        """Read the server's settings again. The caller holds the server's lock."""
        write_rule(self.arrays.rule, self._server)

    @property
    def applies(self) -> bool:
        """Return True if compiled code may apply pushes under the present settings."""
        return bool(self.arrays.rule["applies"][0])

    def live_worker(self, worker: str) -> LiveWorker:
        """Return the numbers of a worker; a worker that has not joined has some that compiled code does not accept."""
        return self._server.live_worker(worker) or NOBODY

    def connection(
        self,
        worker: str,
        stream: int,
        head: NDArray[np.uint8],
        tags: FrameTags | None,
        payloads: NDArray[np.uint8],
        shared: tuple[FloatArray, Sequence[int], Sequence[int]] | None,
        follows: bool,
    ) -> CompiledConnection:
        """Return the path's end at one connection.

        Args:
            worker: name of the worker.
            stream: descriptor of the socket.
            head: memory into which headers are received, and tags if there are any.
            tags: tags of the frames; None: they have none.
            payloads: `[slots, bytes]`, a multiple of 4 bytes: memory into which the payload of each slot is received.
                It begins with the gradient if the worker's memory is not shared.
            shared: the worker's memory, and for each slot the indices at which the partition's gradient and weights
                begin; None: it is not shared.
            follows: True to bind the connection's thread to the processor of the worker.
        """
        state = self.arrays.state
        size = len(state.weights)
        inline = 0 if shared else 4 * size  # bytes of the gradient and of the weights in frames
        payload = inline + state.journal.shape[1] - RECORD.itemsize  # the rest are versions, as in the journal
        flags = MSG_NOSIGNAL | (MSG_DONTWAIT if shared else 0)
        incarnation = int(state.version[INCARNATION])
        receives = tags is None or self._libcrypto is not None
        incoming, outgoing = self._gmacs(tags)
        head = head[: HEADER_SIZE + (TAG_SIZE if receives and tags else 0)]
        answer = np.zeros(len(head) + inline, np.uint8)
        slots = len(payloads)
        if shared:
            memory, starts, targets = shared
            outputs = memory
        else:
            memory = payloads.reshape(-1).view(np.float32)
            starts = [slot * payloads.shape[1] // 4 for slot in range(slots)]
            outputs = answer[len(head) :].view(np.float32)
            targets = [0] * slots
        arrays = ConnectionArrays(
            np.array([stream, incarnation, payload, size, shared is not None, flags, follows, len(head)]),
            np.zeros(6, np.int64),
            head,
            head[:HEADER_SIZE].view(HEADER),
            answer,
            answer[:HEADER_SIZE].view(HEADER),
            outputs,
            np.array(targets, np.int64),
            memory,
            np.array(starts, np.int64),
            payloads,
            np.zeros(2, np.int64),
            np.zeros(MAX_PROCESSORS // 64, np.uint64),
            incoming,
            outgoing,
        )
        return CompiledConnection(self, worker, arrays, receives)

    def _gmacs(self, tags: FrameTags | None) -> tuple[GmacArrays, GmacArrays]:
        """Return the arrays for the tags of incoming and of outgoing frames, without content if they are not used."""
        if tags is None or self._libcrypto is None:
            return no_gmac(), no_gmac()
        return self._libcrypto.gmac(tags.incoming), self._libcrypto.gmac(tags.outgoing)


class Stop(NamedTuple):
    """Why compiled code returned to Python."""

    error: int  # error number of the system call that failed; 0: none failed
    header_got: int  # bytes received of the frame's header
    payload_got: int  # bytes received of its payload
    is_unsent: bool  # True if the last push was applied, but its answer was not sent as a whole
    unsent: memoryview  # rest of that answer


class CompiledConnection:
    """One connection of a server with a compiled push path. Only the thread of the connection may use it.

    Args:
        path: path of the server.
        worker: name of the worker.
        arrays: memory of the connection.
        receives: False if Python has to receive pushes and send the answers, because frames have tags that compiled
            code cannot compute.

    Attributes:
        receives: False if only `take` may be called, else only `serve`.
    """

    def __init__(self, path: CompiledPath, worker: str, arrays: ConnectionArrays, receives: bool) -> None:
        self.receives = receives
        self._path = path
        self._name = worker
        self._arrays = arrays
        self._processors = os.sched_getaffinity(0)  # where this thread may run, unless it follows the worker

    def serve(self) -> Stop:
        """Receive, apply and answer pushes until Python is needed."""
        status = serve(self._path.arrays, self._worker(), self._arrays)
        progress = self._arrays.progress.tolist()
        unsent = self._arrays.answer.data[progress[SENT] : len(self._arrays.head) + self._payload]
        return Stop(progress[ERROR], progress[HEADER_GOT], progress[PAYLOAD_GOT], status == UNSENT, unsent)

    def take(self) -> bool:
        """Apply the push whose header and payload Python has received. Return False if nothing was changed."""
        return take_push(self._path.arrays, self._worker(), self._arrays)

    def answer(self) -> tuple[bytes, memoryview]:
        """Return the header and the weights of the answer to the push that was taken last."""
        answer = self._arrays.answer.data
        return bytes(answer[:HEADER_SIZE]), answer[HEADER_SIZE : HEADER_SIZE + self._payload]

    def stop_following(self) -> None:
        """Let the thread run on any processor again, after it was bound to the worker's; see `serve._follow`."""
        if self._arrays.processors.any():
            os.sched_setaffinity(0, self._processors)
            self._arrays.processors[:] = 0
            self._arrays.progress[PUSHES_THERE] = 0

    @property
    def _payload(self) -> int:
        """Return the number of bytes of weights in the last answer."""
        return int(self._arrays.answer_fields["payload"][0])

    def _worker(self) -> WorkerArrays:
        return worker_arrays(self._name, self._path.live_worker(self._name))
