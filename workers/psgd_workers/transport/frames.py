"""Frames: the messages on the sockets of the shm and tcp lanes.

A frame is a header of fixed size, which ends with its own checksum, and a payload, whose length the header gives: the
vectors that are not in shared memory. Bytes that are no frame of this job are refused before they are used. Numbers are
little-endian.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from math import ceil
from struct import Struct
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from psgd_workers.errors import FrameError
from psgd_workers.gradients.compression import ARRAYS
from psgd_workers.messages import BatchId, Encoded, FloatArray, Gradient, Outcome, Receipt, Version
from psgd_workers.transport.affinity import NOWHERE
from psgd_workers.transport.memory import Slot

__all__ = ["HEADER_SIZE", "Frame", "FrameKind", "PushFormat", "PushHeader", "ReceiptHeader", "pack_receipt"]

MAGIC = b"psgd"
FORMAT = 1
# Magic, format, kind, slot, code, incarnation, examples, payload, epoch, shard, index, the version's incarnation and
# updates, loss, norm, compute_s, number, carries, wants, processor. Each field lies at a multiple of its size.
FIELDS = Struct("<4sBBBBIIQIIIIQdddQQHH")
FIXED = Struct("<4sBBBBI")  # the fields that are the same in all pushes of a slot: the first six
PUSH_FIELDS = Struct("<IQIIIIQdddQQHH")  # the other fields of a push
RECEIPT_START = Struct("<4sBBB")  # magic, format, kind, slot
# Start, code, incarnation, payload, epoch, shard, index, the version's incarnation and updates, checksum.
RECEIPT_FIELDS = Struct("<7sBI4xQIIIIQ44xI")
HEADER = Struct(f"{FIELDS.format}I")  # the fields, then their CRC-32
HEADER_SIZE = HEADER.size
ENCODINGS = ("", *ARRAYS)  # compression by the code of a push; "": values are not compressed
OUTCOMES = tuple(Outcome)  # outcome by the code of a receipt
CODES = {outcome: code for code, outcome in enumerate(OUTCOMES)}
CHECKSUM = Struct("<I")
LENGTHS = Struct("<QQ")  # lengths of the two arrays of an encoded gradient
VERSION = Struct("<IQ")  # incarnation, updates
ALIGNMENT = 8  # bytes; each array in a payload begins at a multiple of it


class FrameKind(IntEnum):
    """The kinds of frames."""

    PUSH = 1  # from the worker: a gradient
    PULL = 2  # from the worker: a request for the weights
    ASK = 3  # from the worker: a request for the version
    RECEIPT = 4  # from the server: the answer to PUSH
    WEIGHTS = 5  # from the server: the answer to PULL
    VERSION = 6  # from the server: the answer to ASK


KINDS = {kind.value: kind for kind in FrameKind}
RECEIPT = FrameKind.RECEIPT  # bound once: in Python 3.11, access through the enum takes 80 ns
UNUSED = (0.0, 0.0, 0.0, 0, 0)  # fields of a push that a receipt does not have


class Frame(NamedTuple):
    """The header of a frame. Fields that a frame of its kind does not use are 0."""

    kind: FrameKind
    slot: int  # number of the worker's slot
    code: int  # index in ENCODINGS of a push's compression, or in OUTCOMES of a receipt's outcome
    wants: bool  # weights are wanted with the answer
    incarnation: int  # incarnation of the server
    payload: int  # number of bytes that follow the header
    batch: BatchId = BatchId(0, 0, 0)
    examples: int = 0
    version: Version = Version(0, 0)  # version that a push was computed from, or that an answer's server has
    loss: float = 0.0
    norm: float = 0.0
    compute_s: float = 0.0
    number: int = 0  # number of a push; see `Gradient`
    carries: int = 0  # field `carries` of a push; see `Gradient`
    processor: int = NOWHERE  # processor on which the worker runs, in a push on the shm lane

    def pack(self) -> bytes:
        """Return the header as `HEADER_SIZE` bytes."""
        kind, slot, code, wants, incarnation, payload, batch, examples, version, *rest, processor = self
        fields = (MAGIC, FORMAT, kind, slot, code, incarnation, examples, payload, *batch, *version, *rest)
        return _with_checksum(FIELDS.pack(*fields, wants, processor))

    @classmethod
    def unpack(cls, header: bytes | bytearray | memoryview) -> Frame:
        """Read a header, `HEADER_SIZE` bytes.

        Raises:
            FrameError: the bytes are no header: of another length or format, damaged, or of an unknown kind.
        """
        if len(header) != HEADER_SIZE:
            raise FrameError(f"a frame has a header of {len(header)} bytes, expected {HEADER_SIZE}")
        (
            magic,
            format_number,
            kind,
            slot,
            code,
            incarnation,
            examples,
            payload,
            epoch,
            shard,
            index,
            version_incarnation,
            version_updates,
            loss,
            norm,
            compute_s,
            number,
            carries,
            wants,
            processor,
            checksum,
        ) = HEADER.unpack(header)
        if magic != MAGIC or format_number != FORMAT:
            raise FrameError(
                f"a frame begins with {magic!r} and format {format_number}, expected {MAGIC!r} and {FORMAT}"
            )
        if checksum != crc32(header[: FIELDS.size]):
            raise FrameError("the checksum of a frame's header is wrong")
        if kind not in KINDS or wants > 1:
            raise FrameError(
                f"a frame has kind {kind} and `wants` {wants}; expected a kind from 1 to {len(KINDS)}, and 0 or 1 in "
                "`wants`"
            )
        return cls(
            KINDS[kind],
            slot,
            code,
            wants == 1,
            incarnation,
            payload,
            BatchId(epoch, shard, index),
            examples,
            Version(version_incarnation, version_updates),
            loss,
            norm,
            compute_s,
            number,
            carries,
            processor,
        )

    def receipt(self, worker: str) -> Receipt:
        """Return the receipt that this header carries.

        Args:
            worker: name of the worker that pushed.

        Raises:
            FrameError: the frame is no receipt, or its code is no outcome.
        """
        if self.kind is not FrameKind.RECEIPT or self.code >= len(OUTCOMES):
            raise FrameError(f"the server answered {self.kind.name} with code {self.code}, expected a receipt")
        return Receipt(worker, self.batch, OUTCOMES[self.code], self.version)


def pack_receipt(receipt: Receipt, slot: int, wants: bool, payload: int) -> bytes:
    """Return the header of a receipt as bytes. It builds no `Frame`, unlike `Frame.pack`: that takes twice as long.

    Args:
        receipt: the receipt.
        slot: number of the slot from which the push came.
        wants: True if the push wanted the new weights.
        payload: length of the weights that follow, in bytes; 0 if they are in shared memory.
    """
    _, batch, outcome, version = receipt
    fields = (MAGIC, FORMAT, RECEIPT, slot, CODES[outcome], version.incarnation, 0, payload, *batch, *version)
    return _with_checksum(FIELDS.pack(*fields, *UNUSED, wants, NOWHERE))


def _with_checksum(fields: bytes) -> bytes:
    return fields + CHECKSUM.pack(crc32(fields))


class PushHeader:
    """The header of the pushes of one slot: memory that is kept, and whose changing fields are written for each push.

    Args:
        slot: number of the slot.
        encoding: name of the compression; "": values are not compressed.
        incarnation: incarnation of the server.
    """

    def __init__(self, slot: int, encoding: str, incarnation: int) -> None:
        self._bytes = bytearray(HEADER_SIZE)
        FIXED.pack_into(self._bytes, 0, MAGIC, FORMAT, FrameKind.PUSH, slot, ENCODINGS.index(encoding), incarnation)
        self._checked = memoryview(self._bytes)[: FIELDS.size]

    def write(self, gradient: Gradient, payload: int, wants: bool, processor: int = NOWHERE) -> bytearray:
        """Write a push into the header, and return it. The next call changes it.

        Args:
            gradient: the push.
            payload: length of the payload, in bytes.
            wants: True if the new weights are to come with the receipt.
            processor: processor of the server's machine on which the worker runs.
        """
        _, _, number, batch, examples, read, _, loss, norm, compute_s, _, _, _, carries = gradient
        header = self._bytes
        PUSH_FIELDS.pack_into(
            header,
            FIXED.size,
            examples,
            payload,
            *batch,
            *read,
            loss,
            norm,
            compute_s,
            number,
            carries,
            wants,
            processor,
        )
        CHECKSUM.pack_into(header, FIELDS.size, crc32(self._checked))
        return header


class ReceiptHeader:
    """Reads the headers of the receipts of one slot, without a `Frame`, which takes three times as long.

    Args:
        slot: number of the slot.
        incarnation: incarnation of the server.
        worker: name of the worker that pushes.
    """

    def __init__(self, slot: int, incarnation: int, worker: str) -> None:
        self._start = RECEIPT_START.pack(MAGIC, FORMAT, RECEIPT, slot)
        self._incarnation = incarnation
        self._worker = worker

    def read(self, header: memoryview) -> Receipt | None:
        """Return the receipt; None if the frame is no receipt for this slot, or has a payload.

        After None, `Frame.unpack` raises an error if the header itself is damaged.

        Args:
            header: `HEADER_SIZE` bytes.
        """
        start, code, sender, payload, epoch, shard, index, incarnation, updates, crc = RECEIPT_FIELDS.unpack(header)
        if start != self._start or sender != self._incarnation or payload or code >= len(OUTCOMES):
            return None
        if crc != crc32(header[: FIELDS.size]):
            return None
        return Receipt(self._worker, BatchId(epoch, shard, index), OUTCOMES[code], Version(incarnation, updates))


class PushFormat(NamedTuple):
    """Layout of the pushes that one partition of a job accepts."""

    size: int  # values of the partition
    num_trainable: int  # values of the partition before the first buffer
    encoding: str = ""  # name of the compression; "": values are not compressed
    sends_weights: bool = False  # a push also carries the weights that it was computed from
    partitions: int = 1  # partitions of the job: a push ends with the versions of the others
    authenticates: bool = False  # frames on the network have tags; see `psgd_workers.transport.authentication`

    def payload(self, gradient: Gradient, shared: bool) -> list[memoryview]:
        """Return the parts of a push's payload: all its vectors that are not in shared memory, then the versions.

        Args:
            gradient: the push.
            shared: True if worker and server share the worker's segment.
        """
        vectors = [*_encoded(gradient.values)] if isinstance(gradient.values, Encoded) else [gradient.values]
        if shared and not self.encoding:
            vectors = []
        if gradient.buffers is not None:
            vectors.append(gradient.buffers)
        if gradient.weights_read is not None and not shared:
            vectors.append(gradient.weights_read)
        parts = [vector.data.cast("B") for vector in vectors if vector.nbytes]
        if gradient.others:
            parts.append(memoryview(b"".join(VERSION.pack(*version) for version in gradient.others)))
        return parts

    def check(self, frame: Frame, sizes: range) -> None:
        """Check the header of a push, before its payload is read.

        Args:
            frame: header of the push.
            sizes: lengths that its payload may have, from `sizes`.

        Raises:
            FrameError: the push has another compression than the job, or a payload of another length.
        """
        if frame.code >= len(ENCODINGS) or ENCODINGS[frame.code] != self.encoding:
            raise FrameError(f"a push has values of code {frame.code}, expected {ENCODINGS.index(self.encoding)}")
        if frame.payload not in sizes:
            raise FrameError(f"a push has {frame.payload} bytes of payload, expected {sizes[0]} to {sizes[-1]}")

    def sizes(self, shared: bool) -> range:
        """Return the lengths that the payload of a push may have, in bytes.

        Args:
            shared: True if worker and server share the worker's segment.
        """
        fixed = VERSION.size * (self.partitions - 1)
        fixed += 4 * self.size if self.sends_weights and not shared else 0
        if not self.encoding:
            exact = fixed + (0 if shared else 4 * self.size)
            return range(exact, exact + 1)
        fixed += 4 * (self.size - self.num_trainable)
        longest = sum(dtype.itemsize for dtype in ARRAYS[self.encoding]) * self.num_trainable
        return range(fixed, fixed + longest + LENGTHS.size + 2 * ALIGNMENT + 1)

    def gradient(self, frame: Frame, payload: memoryview, worker: str, shared: Slot | None) -> Gradient:
        """Return a push, whose vectors are views of its payload and of shared memory.

        Args:
            frame: header that `check` has accepted.
            payload: payload of the frame.
            worker: name of the worker that sent it.
            shared: the partition's slice of the worker's slot; None: all vectors are in the payload.

        Raises:
            FrameError: the payload is shorter or longer than its contents.
        """
        values: FloatArray | Encoded
        buffers = weights_read = None
        if self.encoding:
            values, payload = _decoded(payload, self.encoding, self.num_trainable)
            if self.size > self.num_trainable:
                buffers, payload = _vector(payload, self.size - self.num_trainable)
        elif shared:
            values = shared.gradient
        else:
            values, payload = _vector(payload, self.size)
        if self.sends_weights and shared:
            weights_read = shared.weights
        elif self.sends_weights:
            weights_read, payload = _vector(payload, self.size)
        return Gradient(
            worker,
            frame.slot,
            frame.number,
            frame.batch,
            frame.examples,
            frame.version,
            values,
            frame.loss,
            frame.norm,
            frame.compute_s,
            buffers,
            weights_read,
            _versions(payload, self.partitions - 1),
            frame.carries,
        )


def _encoded(encoded: Encoded) -> Iterator[NDArray[Any]]:
    """Yield the lengths, then each array and its padding."""
    lengths = [len(array) for array in encoded.arrays]
    yield np.array([*lengths, 0][:2], "<u8")
    for array in encoded.arrays:
        yield array
        yield np.zeros(-array.nbytes % ALIGNMENT, np.uint8)


def _decoded(payload: memoryview, kind: str, size: int) -> tuple[Encoded, memoryview]:
    """Return the encoded values at the start of a payload, and the rest of it."""
    if len(payload) < LENGTHS.size:
        raise FrameError(f"an encoded push has {len(payload)} bytes, expected at least {LENGTHS.size}")
    lengths = LENGTHS.unpack_from(payload)
    payload = payload[LENGTHS.size :]
    arrays: list[NDArray[Any]] = []
    for dtype, length in zip(ARRAYS[kind], lengths, strict=False):
        padded = ceil(length * dtype.itemsize / ALIGNMENT) * ALIGNMENT
        if length > size or padded > len(payload):
            raise FrameError(f"an encoded push announces {length} values of {size} in {len(payload)} bytes")
        arrays.append(np.frombuffer(payload, dtype, length))
        payload = payload[padded:]
    return Encoded(kind, size, tuple(arrays)), payload


def _vector(payload: memoryview, size: int) -> tuple[FloatArray, memoryview]:
    """Return the vector at the start of a payload, and the rest of it."""
    if len(payload) < 4 * size:
        raise FrameError(f"a push is {4 * size - len(payload)} bytes too short")
    return np.frombuffer(payload, np.float32, size), payload[4 * size :]


def _versions(payload: memoryview, count: int) -> tuple[Version, ...]:
    """Return the versions at the end of a payload."""
    size = VERSION.size * count
    if len(payload) != size:
        raise FrameError(f"a push has {len(payload)} bytes after its vectors, expected {size}")
    return tuple(Version(*version) for version in VERSION.iter_unpack(payload)) if count else ()
