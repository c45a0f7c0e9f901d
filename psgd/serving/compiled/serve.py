"""The loop that serves one worker's connection in compiled code: receive a push, apply it, answer.

The thread of a connection stays in `serve` from one push of the usual case to the next. It returns to Python with a
frame that compiled code does not handle, or with a connection that is closed or broken.
"""

from __future__ import annotations

from errno import EIO
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from psgd.core.server.push_arrays import INCARNATION, UPDATES
from psgd.serving.compiled.gmac import GmacArrays, add_bytes, begin_tag, count_frame, end_tag, is_tag, is_used
from psgd.serving.compiled.native import compiled, error_location, gettime, lock, recv, send, setaffinity, unlock
from psgd.serving.compiled.push import APPLIED, Header, ServerArrays, WorkerArrays, apply_push
from psgd_workers.messages import FloatArray
from psgd_workers.transport.frames import FIELDS, FORMAT, HEADER_SIZE, MAGIC, VERSION, FrameKind

__all__ = [
    "ERROR",
    "HEADER_GOT",
    "INCOMPLETE",
    "MAX_PROCESSORS",
    "PAYLOAD_GOT",
    "PIECE",
    "PUSHES_THERE",
    "SENT",
    "SETTLED",
    "UNHANDLED",
    "UNSENT",
    "ConnectionArrays",
    "serve",
    "take_push",
]

# Values that `serve` returns.
INCOMPLETE = 0  # a frame was not received as a whole, its tag is wrong, or its header is none that is handled here
UNHANDLED = 1  # a push was received as a whole, and nothing was changed
UNSENT = 2  # a push was applied, but its answer was not sent as a whole

# Indices of `ConnectionArrays.plan`.
STREAM, SERVER_INCARNATION, PAYLOAD, VALUES, IS_SHARED, FLAGS, FOLLOWS, HEAD = range(8)
# Indices of `ConnectionArrays.progress`.
HEADER_GOT, PAYLOAD_GOT, SENT, ERROR, PROCESSOR, PUSHES_THERE = range(6)

PUSH = int(FrameKind.PUSH)
RECEIPT = int(FrameKind.RECEIPT)
MAGIC_NUMBER = int.from_bytes(MAGIC, "little")
CHECKED = FIELDS.size  # bytes of a header before its checksum
VERSION_SIZE = VERSION.size
WAIT_FOR_ALL = 0x100  # MSG_WAITALL of Linux
CLOCK_MONOTONIC = 1
PIECE = 1 << 17  # bytes of a payload that are received at once, if the frame has a tag
SETTLED = 8  # pushes in a row from one processor, after which the worker is assumed to stay there
MAX_PROCESSORS = 1024  # bits of a cpu_set_t


def _crc_table() -> NDArray[np.uint32]:
    """Return the table of CRC-32 with the polynomial of zlib (ISO 3309), one entry for each byte."""
    entries = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        entries = np.where(entries & 1, (entries >> 1) ^ np.uint32(0xEDB88320), entries >> 1)
    return entries


CRC_TABLE = _crc_table()


class ConnectionArrays(NamedTuple):
    """The arrays of a connection that compiled code uses."""

    plan: NDArray[np.int64]  # [8]: socket, the server's incarnation, bytes of a payload, values of the partition,
    # 1 if memory is shared, flags of `send`, 1 if the thread follows the worker to its processor, and bytes of a head
    progress: NDArray[np.int64]  # [6]: bytes received of the header and of the payload, bytes sent, error number,
    # processor of the last push, and number of pushes in a row from there
    head: NDArray[np.uint8]  # [HEADER_SIZE, and TAG_SIZE if compiled code handles tags], received: header and tag
    fields: Header  # [1], view of `head`
    answer: NDArray[np.uint8]  # [bytes of a head + bytes of the weights to send]
    answer_fields: Header  # [1], view of `answer`
    outputs: FloatArray  # memory for the weights of the answers: the worker's, or `answer` after its head
    targets: NDArray[np.int64]  # [slots]: index in `outputs` at which the weights of a slot begin
    memory: FloatArray  # memory that contains the gradients of all slots
    starts: NDArray[np.int64]  # [slots]: index in `memory` at which the gradient of a slot begins
    payloads: NDArray[np.uint8]  # [slots, bytes]: payload of each slot
    clock: NDArray[np.int64]  # [2]: seconds and nanoseconds
    processors: NDArray[np.uint64]  # [1024 / 64]: cpu_set_t with the processor of this thread
    incoming: GmacArrays  # tags of the frames from the worker
    outgoing: GmacArrays  # tags of the frames to the worker


@compiled
def serve(server: ServerArrays, worker: WorkerArrays, connection: ConnectionArrays) -> int:
    """Serve pushes until one is not handled here, or the connection is closed or broken.

    A frame that is not applied is not counted, so that Python checks its tag again, and refuses it if that is wrong.

    Returns:
        INCOMPLETE, UNHANDLED or UNSENT. `connection.progress` says how much was received and sent.
    """
    while True:
        if not _receive(connection):
            return INCOMPLETE
        if connection.plan[FOLLOWS]:
            _follow(connection)
        if not take_push(server, worker, connection):
            return UNHANDLED
        count_frame(connection.incoming)
        if not (_seal(connection) and _send(connection)):
            return UNSENT


@compiled
def take_push(server: ServerArrays, worker: WorkerArrays, connection: ConnectionArrays) -> bool:
    """Apply the push in hand and write its answer. Return False if nothing was changed.

    The header is one that `_is_handled`, or Python has checked in the same way.
    """
    plan = connection.plan
    fields = connection.fields[0]
    slot = np.int64(fields.slot)
    start = connection.starts[slot]
    values = connection.memory[start : start + plan[VALUES]]
    payload = connection.payloads[slot]
    others = payload[plan[PAYLOAD] - VERSION_SIZE * (server.rule[0].partitions - 1) : plan[PAYLOAD]]
    lock(server.mutex.ctypes)
    gettime(CLOCK_MONOTONIC, connection.clock.ctypes)
    now = connection.clock[0] + connection.clock[1] * 1e-9
    size = plan[VALUES] if fields.wants else 0
    target = connection.targets[slot]
    weights = connection.outputs[target : target + size]
    is_applied = apply_push(server, worker, fields, values, others, now, weights)
    updates = server.state.version[UPDATES]
    unlock(server.mutex.ctypes)
    if is_applied:
        _write_answer(connection, server.state.version[INCARNATION], updates)
    return is_applied


@compiled
def _follow(connection: ConnectionArrays) -> None:
    """Bind this thread to the worker's processor, which is idle while the worker waits for its receipt.

    Left to itself, the system often runs a thread where it ran last, beside another worker that computes. A worker that
    often changes its processor is not followed: each move costs more than a few pushes gain.
    """
    progress = connection.progress
    processor = np.int64(connection.fields[0].processor)
    if processor != progress[PROCESSOR]:
        progress[PROCESSOR] = processor
        progress[PUSHES_THERE] = 0
    progress[PUSHES_THERE] += 1
    if progress[PUSHES_THERE] == SETTLED and processor < MAX_PROCESSORS:
        connection.processors[:] = 0
        connection.processors[processor >> 6] = np.uint64(1) << np.uint64(processor & 63)
        # If the server may not run there, nothing changes.
        setaffinity(0, 8 * len(connection.processors), connection.processors.ctypes)


@compiled
def _receive(connection: ConnectionArrays) -> bool:
    """Receive a push as a whole. Return False if that fails, its tag is wrong, or its header is none for this path."""
    progress = connection.progress
    plan = connection.plan
    progress[: ERROR + 1] = 0
    progress[HEADER_GOT] = _receive_into(connection, connection.head)
    if progress[HEADER_GOT] != plan[HEAD] or not _is_handled(connection):
        return False
    payload = connection.payloads[np.int64(connection.fields[0].slot)][: plan[PAYLOAD]]
    if is_used(connection.incoming):
        return _receive_checked(connection, payload)
    if len(payload):
        progress[PAYLOAD_GOT] = _receive_into(connection, payload)
    return progress[PAYLOAD_GOT] == len(payload)


@compiled
def _receive_checked(connection: ConnectionArrays, payload: NDArray[np.uint8]) -> bool:
    """Receive a payload of a frame with a tag. Return False if that fails, or the tag is wrong.

    A piece is added to the tag while the next one is under way.
    """
    gmac = connection.incoming
    if not (begin_tag(gmac) and add_bytes(gmac, connection.head[:HEADER_SIZE])):
        return False
    for start in range(0, len(payload), PIECE):
        piece = payload[start : start + PIECE]
        got = _receive_into(connection, piece)
        connection.progress[PAYLOAD_GOT] += got
        if got < len(piece) or not add_bytes(gmac, piece):
            return False
    return end_tag(gmac) and is_tag(gmac, connection.head[HEADER_SIZE:])


@compiled
def _receive_into(connection: ConnectionArrays, into: NDArray[np.uint8]) -> int:
    """Wait until `into` is full. Return the number of bytes received: fewer if the connection is closed or broken."""
    got = recv(connection.plan[STREAM], into.ctypes, len(into), WAIT_FOR_ALL)
    if got >= 0:
        return got
    connection.progress[ERROR] = error_location()[0]
    return 0


@compiled
def _is_handled(connection: ConnectionArrays) -> bool:
    """Return True if the header is of a push that this connection may carry. It does not check batch and versions."""
    fields = connection.fields[0]
    plan = connection.plan
    return (
        fields.magic == MAGIC_NUMBER
        and fields.format == FORMAT
        and fields.checksum == _checksum(connection.head)
        and fields.kind == PUSH
        and fields.code == 0
        and fields.slot < len(connection.starts)
        and fields.incarnation == plan[SERVER_INCARNATION]
        and fields.payload == np.uint64(plan[PAYLOAD])
        and fields.wants <= 1
    )


@compiled
def _checksum(header: NDArray[np.uint8]) -> np.uint32:
    """Return the CRC-32 of a header's fields."""
    crc = np.uint32(0xFFFFFFFF)
    for i in range(CHECKED):
        crc = CRC_TABLE[(crc ^ header[i]) & np.uint32(0xFF)] ^ (crc >> np.uint32(8))
    return crc ^ np.uint32(0xFFFFFFFF)


@compiled
def _write_answer(connection: ConnectionArrays, incarnation: int, updates: int) -> None:
    """Write the receipt of an applied push."""
    pushed = connection.fields[0]
    receipt = connection.answer_fields[0]
    receipt.magic = MAGIC_NUMBER
    receipt.format = FORMAT
    receipt.kind = RECEIPT
    receipt.slot = pushed.slot
    receipt.code = APPLIED
    receipt.incarnation = incarnation
    has_payload = pushed.wants and not connection.plan[IS_SHARED]
    receipt.payload = 4 * connection.plan[VALUES] if has_payload else 0
    receipt.epoch = pushed.epoch
    receipt.shard = pushed.shard
    receipt.index = pushed.index
    receipt.read_incarnation = incarnation
    receipt.read_updates = updates
    receipt.wants = pushed.wants
    receipt.checksum = _checksum(connection.answer)


@compiled
def _seal(connection: ConnectionArrays) -> bool:
    """Write the tag of the answer, if frames have tags. Return False if that fails."""
    gmac = connection.outgoing
    if not is_used(gmac):
        return True
    answer = connection.answer
    payload = answer[connection.plan[HEAD] :][: np.int64(connection.answer_fields[0].payload)]
    if not (begin_tag(gmac) and add_bytes(gmac, answer[:HEADER_SIZE]) and add_bytes(gmac, payload) and end_tag(gmac)):
        connection.progress[ERROR] = EIO
        return False
    count_frame(gmac)
    answer[HEADER_SIZE : connection.plan[HEAD]] = gmac.tag
    return True


@compiled
def _send(connection: ConnectionArrays) -> bool:
    """Send the answer. Return False if it was not sent as a whole."""
    plan = connection.plan
    size = plan[HEAD] + np.int64(connection.answer_fields[0].payload)
    sent = send(plan[STREAM], connection.answer.ctypes, size, plan[FLAGS])
    if sent < 0:
        connection.progress[ERROR] = error_location()[0]
        sent = 0
    connection.progress[SENT] = sent
    return sent == size
