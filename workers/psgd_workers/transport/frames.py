"""Frames: what the sockets of the shm and tcp lanes carry.

A frame is a header of fixed size, which ends with a checksum of itself, and a payload of as many bytes as the header
says: the vectors that do not lie in shared memory. What is not exactly a frame of this job is refused before anything
is done with it. Numbers are little-endian.
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

__all__ = ["HEADER_SIZE", "Frame", "FrameKind", "PushFormat"]

MAGIC = b"psgd"
FORMAT = 1
# Magic, format, kind, slot, code, wants, incarnation, payload, epoch, shard, index, examples, the version, loss, norm,
# seconds, number, carries, processor.
FIELDS = Struct("<4sBBBBIIQIIIIIQdddQQH")
HEADER = Struct(f"{FIELDS.format}I")  # and a checksum of them
HEADER_SIZE = HEADER.size
ENCODINGS = ("", *ARRAYS)  # by the code of a push: how its values travel
OUTCOMES = tuple(Outcome)  # by the code of a receipt
CODES = {outcome: code for code, outcome in enumerate(OUTCOMES)}
LENGTHS = Struct("<QQ")  # of an encoded gradient's arrays
VERSION = Struct("<IQ")  # incarnation, updates
SMALL = 16_384  # values: any push fits into a socket's buffer
ALIGNMENT = 8  # of each array in a payload, in bytes


class FrameKind(IntEnum):
    """What a frame is."""

    PUSH = 1  # a gradient, to the server
    PULL = 2  # the weights are wanted
    ASK = 3  # the version is wanted
    RECEIPT = 4  # of a push, from the server
    WEIGHTS = 5  # the answer to PULL
    VERSION = 6  # the answer to ASK


KINDS = {kind.value: kind for kind in FrameKind}


class Frame(NamedTuple):
    """A header. Fields that say nothing in a frame of its kind are 0."""

    kind: FrameKind
    slot: int  # of the worker's batches in hand
    code: int  # of a push: how its values travel; of a receipt: the outcome
    wants: bool  # of a push: whether the weights are to come with the receipt
    incarnation: int  # of the server
    payload: int  # bytes that follow
    batch: BatchId = BatchId(0, 0, 0)
    examples: int = 0
    version: Version = Version(0, 0)  # of a push: that it was computed from; else the server's
    loss: float = 0.0
    norm: float = 0.0
    compute_s: float = 0.0
    number: int = 0  # of a push, as `Gradient` has it; so are the next
    carries: int = 0
    processor: int = NOWHERE  # of a push by a lane on one machine: where its worker is

    def pack(self) -> bytes:
        """The header as bytes."""
        kind, slot, code, wants, incarnation, payload, batch, examples, version, *rest = self
        fields = FIELDS.pack(
            MAGIC, FORMAT, kind, slot, code, wants, incarnation, payload, *batch, examples, *version, *rest
        )
        return fields + crc32(fields).to_bytes(4, "little")

    @classmethod
    def unpack(cls, header: bytes | bytearray | memoryview) -> Frame:
        """Read a header, `HEADER_SIZE` bytes.

        Raises:
            FrameError: it is none.
        """
        if len(header) != HEADER_SIZE:
            raise FrameError(f"a frame's header of {len(header)} bytes, expected {HEADER_SIZE}")
        (
            magic,
            form,
            kind,
            slot,
            code,
            wants,
            incarnation,
            payload,
            epoch,
            shard,
            index,
            examples,
            read,
            updates,
            loss,
            norm,
            compute_s,
            number,
            carries,
            processor,
            checksum,
        ) = HEADER.unpack(header)
        if magic != MAGIC or form != FORMAT:
            raise FrameError(f"a frame begins with {magic!r} and format {form}, expected {MAGIC!r} and {FORMAT}")
        if checksum != crc32(header[: FIELDS.size]):
            raise FrameError("a frame's checksum is not that of its header")
        if kind not in KINDS or wants > 1:
            raise FrameError(f"a frame of kind {kind} that wants {wants}: there are kinds 1 to {len(KINDS)}")
        return cls(
            KINDS[kind],
            slot,
            code,
            wants == 1,
            incarnation,
            payload,
            BatchId(epoch, shard, index),
            examples,
            Version(read, updates),
            loss,
            norm,
            compute_s,
            number,
            carries,
            processor,
        )

    @classmethod
    def of_push(
        cls, gradient: Gradient, slot: int, wants: bool, incarnation: int, payload: int, processor: int = NOWHERE
    ) -> Frame:
        """The header of a gradient."""
        _, _, number, batch, examples, read, values, loss, norm, compute_s, _, _, _, carries = gradient
        code = ENCODINGS.index(values.kind) if isinstance(values, Encoded) else 0
        of = batch, examples, read, loss, norm, compute_s, number, carries
        return cls(FrameKind.PUSH, slot, code, wants, incarnation, payload, *of, processor)

    @classmethod
    def of_receipt(cls, receipt: Receipt, slot: int, wants: bool, payload: int) -> Frame:
        """The header of a receipt."""
        _, batch, outcome, version = receipt
        return cls(FrameKind.RECEIPT, slot, CODES[outcome], wants, version.incarnation, payload, batch, 0, version)

    def receipt(self, worker: str) -> Receipt:
        """The receipt that this is.

        Raises:
            FrameError: of no outcome there is.
        """
        if self.kind is not FrameKind.RECEIPT or self.code >= len(OUTCOMES):
            raise FrameError(f"a receipt was expected, and {self.kind.name} with code {self.code} came")
        return Receipt(worker, self.batch, OUTCOMES[self.code], self.version)


class PushFormat(NamedTuple):
    """What the pushes of a job to one partition look like."""

    size: int  # values of the partition
    num_trainable: int  # ... before the first buffer
    encoding: str = ""  # name of the compression; empty: values travel as they are
    sends_weights: bool = False  # whether a push brings the weights along that it was computed from
    partitions: int = 1  # of the job: a push ends with its versions of the others

    @property
    def is_small(self) -> bool:
        """Whether pushes take the interpreter's time rather than memory's: one thread serves a machine's workers."""
        return self.size <= SMALL

    def payload(self, gradient: Gradient, shared: bool) -> list[memoryview]:
        """What travels inline: everything but what lies in shared memory."""
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
        """Refuse the header of a push that this partition does not take, before its payload is read.

        Raises:
            FrameError: other values than the job's, or a payload of none of those sizes.
        """
        if frame.code >= len(ENCODINGS) or ENCODINGS[frame.code] != self.encoding:
            raise FrameError(f"a push with values of code {frame.code}, expected {ENCODINGS.index(self.encoding)}")
        if frame.payload not in sizes:
            raise FrameError(f"a push with {frame.payload} bytes of payload, expected {sizes[0]} to {sizes[-1]}")

    def sizes(self, shared: bool) -> range:
        """Of a payload, in bytes."""
        beside = VERSION.size * (self.partitions - 1)
        beside += 4 * self.size if self.sends_weights and not shared else 0
        if not self.encoding:
            exact = beside + (0 if shared else 4 * self.size)
            return range(exact, exact + 1)
        beside += 4 * (self.size - self.num_trainable)
        longest = sum(dtype.itemsize for dtype in ARRAYS[self.encoding]) * self.num_trainable
        return range(beside, beside + longest + LENGTHS.size + 2 * ALIGNMENT + 1)

    def gradient(self, frame: Frame, payload: memoryview, worker: str, shared: Slot | None) -> Gradient:
        """The push, as views of its payload and of shared memory.

        Args:
            frame: that `check` let pass.
            payload: its payload.
            worker: who sent it.
            shared: the partition's part of the worker's memory; None: everything is in the payload.

        Raises:
            FrameError: the payload is not made as its lengths say.
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
    """Lengths, then the arrays, each filled up to the alignment."""
    lengths = [len(array) for array in encoded.arrays]
    yield np.array([*lengths, 0][:2], "<u8")
    for array in encoded.arrays:
        yield array
        yield np.zeros(-array.nbytes % ALIGNMENT, np.uint8)


def _decoded(payload: memoryview, kind: str, size: int) -> tuple[Encoded, memoryview]:
    if len(payload) < LENGTHS.size:
        raise FrameError(f"an encoded push of {len(payload)} bytes, expected at least {LENGTHS.size}")
    lengths = LENGTHS.unpack_from(payload)
    payload = payload[LENGTHS.size :]
    arrays: list[NDArray[Any]] = []
    for dtype, length in zip(ARRAYS[kind], lengths, strict=False):
        taken = ceil(length * dtype.itemsize / ALIGNMENT) * ALIGNMENT
        if length > size or taken > len(payload):
            raise FrameError(f"an encoded push says it has {length} values of {size}, in {len(payload)} bytes")
        arrays.append(np.frombuffer(payload, dtype, length))
        payload = payload[taken:]
    return Encoded(kind, size, tuple(arrays)), payload


def _vector(payload: memoryview, size: int) -> tuple[FloatArray, memoryview]:
    if len(payload) < 4 * size:
        raise FrameError(f"a push is {4 * size - len(payload)} bytes short")
    return np.frombuffer(payload, np.float32, size), payload[4 * size :]


def _versions(payload: memoryview, count: int) -> tuple[Version, ...]:
    """Read the versions that end a payload."""
    size = VERSION.size * count
    if len(payload) != size:
        raise FrameError(f"a push ends with {len(payload)} bytes behind its vectors, expected {size}")
    return tuple(Version(*version) for version in VERSION.iter_unpack(payload)) if count else ()
