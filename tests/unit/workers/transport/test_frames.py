from __future__ import annotations

import struct
from collections.abc import Iterator
from math import nan
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from psgd_workers.errors import EncodingError, FrameError
from psgd_workers.gradients.compression import build_compressor, decode
from psgd_workers.messages import BatchId, Encoded, FloatArray, Gradient, Outcome, Receipt, Version
from psgd_workers.spec import (
    CompressionSpec,
    Fp16Compression,
    Int8Compression,
    NoCompression,
    ScaledSignCompression,
    TopKCompression,
)
from psgd_workers.transport.frames import HEADER_SIZE, Frame, FrameKind, PushFormat, pack_receipt
from psgd_workers.transport.memory import Slot
from tests.support.jobs import push_header

BYTE, SHORT, WORD, LONG = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32, 64))
FRAMES = st.builds(
    Frame,
    kind=st.sampled_from(FrameKind),
    slot=BYTE,
    code=BYTE,
    wants=st.booleans(),
    incarnation=WORD,
    payload=LONG,
    batch=st.builds(BatchId, WORD, WORD, WORD),
    examples=WORD,
    version=st.builds(Version, WORD, LONG),
    loss=st.floats(allow_nan=False),
    norm=st.floats(allow_nan=False),
    compute_s=st.floats(allow_nan=False),
    number=LONG,
    carries=LONG,
    processor=SHORT,
)
FRAME = Frame(FrameKind.PUSH, 1, 0, True, 3, 400, BatchId(1, 2, 3), 32, Version(3, 17), 0.25, 1.5, 0.01)
SIZE = 37
TRAINABLE = 30  # odd, so that arrays are padded
OTHERS = (Version(4, 2**40), Version(2**32 - 1, 0))
COMPRESSIONS: list[CompressionSpec] = [
    NoCompression(),
    Fp16Compression(name="fp16"),
    TopKCompression(name="top_k", ratio=0.2),
    ScaledSignCompression(name="scaled_sign"),
    Int8Compression(name="int8"),
]


def with_checksum(header: bytes) -> bytes:
    fields = header[: HEADER_SIZE - 4]
    return fields + struct.pack("<I", crc32(fields))


# Headers


@given(FRAMES)
def test_a_frame_is_read_as_it_was_written(frame: Frame) -> None:
    header = frame.pack()
    assert len(header) == HEADER_SIZE
    assert Frame.unpack(header) == frame


@pytest.mark.parametrize("kind", FrameKind)
def test_a_frame_of_each_kind_is_read_as_that_kind(kind: FrameKind) -> None:
    assert Frame.unpack(bytearray(FRAME._replace(kind=kind).pack())).kind is kind


def test_a_gradient_that_is_not_finite_can_be_told_of() -> None:
    read = Frame.unpack(FRAME._replace(norm=nan, loss=-np.inf).pack())
    assert np.isnan(read.norm)
    assert read.loss == -np.inf


@pytest.mark.parametrize("length", [0, 1, 4, HEADER_SIZE - 1, HEADER_SIZE + 1])
def test_a_header_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(FrameError, match=f"header of {length} bytes, expected {HEADER_SIZE}"):
        Frame.unpack((FRAME.pack() + b"\0")[:length])


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, b"P", r"begins with b'Psgd' and format 1, expected b'psgd' and 1"),
        (4, b"\2", r"begins with b'psgd' and format 2"),
        (5, b"\0", "has kind 0 .* a kind from 1 to 6"),
        (5, b"\7", "has kind 7"),
        (88, b"\2", "`wants` 2; expected .* 0 or 1"),
        (89, b"\1", "`wants` 257"),
    ],
)
def test_what_no_frame_says_is_refused_whatever_its_checksum(place: int, value: bytes, message: str) -> None:
    header = FRAME.pack()
    changed = header[:place] + value + header[place + 1 :]
    with pytest.raises(FrameError):
        Frame.unpack(changed)
    with pytest.raises(FrameError, match=message):
        Frame.unpack(with_checksum(changed))


def test_any_flipped_bit_is_noticed() -> None:
    header = int.from_bytes(FRAME.pack())
    for bit in range(8 * HEADER_SIZE):
        with pytest.raises(FrameError):
            Frame.unpack((header ^ 1 << bit).to_bytes(HEADER_SIZE))


def damaged(rng: np.random.Generator) -> Iterator[bytes]:
    """Yield 100,000 headers: with flipped bits, overwritten bytes, cut off, random; some have the right checksum."""
    good = np.frombuffer(FRAME.pack(), np.uint8)
    flipped = np.tile(good, (30_000, 1))
    for _ in range(4):
        places = rng.integers(HEADER_SIZE, size=len(flipped))
        flipped[np.arange(len(flipped)), places] ^= (1 << rng.integers(8, size=len(flipped))).astype(np.uint8)
    written = np.tile(good, (30_000, 1))
    changed = rng.random(written.shape) < 0.05
    written[changed] = rng.integers(256, size=np.count_nonzero(changed))
    for header in flipped:
        yield header.tobytes()
    for number, header in enumerate(written):
        yield with_checksum(header.tobytes()) if number % 2 else header.tobytes()
    for length in rng.integers(HEADER_SIZE, size=10_000):
        yield good[:length].tobytes()
    for header in rng.integers(256, size=(30_000, HEADER_SIZE), dtype=np.uint8):
        yield header.tobytes()


def test_damaged_headers_are_refused_or_say_what_their_bytes_say() -> None:
    read = refused = 0
    for header in damaged(np.random.default_rng(0)):
        try:
            frame = Frame.unpack(header)
        except FrameError:
            refused += 1
        else:
            assert frame.pack() == header
            read += 1
    assert read + refused == 100_000
    assert read > 1000


# Receipts


@pytest.mark.parametrize("outcome", Outcome)
def test_a_receipt_is_read_as_it_was_given(outcome: Outcome) -> None:
    receipt = Receipt("worker-7", BatchId(4, 5, 6), outcome, Version(2, 99))
    frame = Frame.unpack(pack_receipt(receipt, slot=3, wants=True, payload=12))
    assert (frame.slot, frame.wants, frame.payload, frame.incarnation) == (3, True, 12, 2)
    assert frame.receipt("worker-7") == receipt


@pytest.mark.parametrize(
    ("change", "message"), [({"code": 6}, "RECEIPT with code 6"), ({"kind": FrameKind.WEIGHTS}, "WEIGHTS with code 0")]
)
def test_what_is_no_receipt_is_refused(change: dict[str, Any], message: str) -> None:
    frame = Frame.unpack(pack_receipt(Receipt("w", BatchId(0, 0, 0), Outcome.APPLIED, Version(1, 1)), 0, False, 0))
    with pytest.raises(FrameError, match=message):
        frame._replace(**change).receipt("w")


# Pushes


def randoms(size: int, seed: int) -> FloatArray:
    return np.random.default_rng(seed).standard_normal(size, dtype=np.float32)


def made(
    compression: CompressionSpec, weights: bool, trainable: int = TRAINABLE, others: tuple[Version, ...] = ()
) -> tuple[PushFormat, Slot, Gradient]:
    """Return the push format of a job with these settings, a slot, and a push from that slot."""
    slot = Slot(randoms(SIZE, 1), randoms(SIZE, 2))
    compressor = build_compressor(compression)
    values: FloatArray | Encoded = slot.gradient
    buffers = None
    if compressor:
        values = compressor.encode(slot.gradient[:trainable])
        buffers = slot.gradient[trainable:] if trainable < SIZE else None
    read = slot.weights if weights else None
    gradient = Gradient("worker-0", 1, 7, BatchId(0, 1, 2), 16, Version(1, 5), values, 0.5, 2.0, 0.01, buffers, read)
    gradient = gradient._replace(others=others, carries=5)
    return PushFormat(SIZE, trainable, compression.name if compressor else "", weights, 1 + len(others)), slot, gradient


def arrays(gradient: Gradient) -> list[NDArray[Any]]:
    values = gradient.values.arrays if isinstance(gradient.values, Encoded) else (gradient.values,)
    return [*values, *(vector for vector in (gradient.buffers, gradient.weights_read) if vector is not None)]


@pytest.mark.parametrize("trainable", [SIZE, TRAINABLE])
@pytest.mark.parametrize("others", [(), OTHERS[:1], OTHERS], ids=["1 server", "2 servers", "3 servers"])
@pytest.mark.parametrize("shared", [False, True], ids=["inline", "shared"])
@pytest.mark.parametrize("weights", [False, True], ids=["plain", "weights"])
@pytest.mark.parametrize("compression", COMPRESSIONS, ids=lambda spec: spec.name)
def test_a_push_arrives_as_it_was_sent(
    compression: CompressionSpec, weights: bool, shared: bool, others: tuple[Version, ...], trainable: int
) -> None:
    push_format, slot, gradient = made(compression, weights, trainable, others)
    parts = push_format.payload(gradient, shared)
    sent = bytearray(b"".join(parts))
    header = push_header(gradient, 1, True, 1, len(sent))
    frame = Frame.unpack(header)
    push_format.check(frame, push_format.sizes(shared))
    came = push_format.gradient(frame, memoryview(sent), "worker-0", slot if shared else None)
    for name in set(Gradient._fields) - {"values", "buffers", "weights_read"}:
        assert getattr(came, name) == getattr(gradient, name)
    assert came.nbytes == gradient.nbytes
    for mine, its in zip(arrays(gradient), arrays(came), strict=True):
        assert (mine.dtype, mine.shape) == (its.dtype, its.shape)
        assert mine.tobytes() == its.tobytes()
    assert (came.buffers is None, came.weights_read is None) == (
        gradient.buffers is None,
        gradient.weights_read is None,
    )
    assert len(sent) in push_format.sizes(shared)


def test_what_lies_in_shared_memory_does_not_travel() -> None:
    push_format, slot, gradient = made(NoCompression(), weights=True)
    assert push_format.payload(gradient, shared=True) == []
    assert push_format.sizes(shared=True) == range(1)
    assert push_format._replace(partitions=3).sizes(shared=True) == range(24, 25), "12 bytes for each other partition"
    came = push_format.gradient(Frame.unpack(push_header(gradient, 0, False, 1, 0)), memoryview(b""), "worker-0", slot)
    assert came.values is slot.gradient
    assert came.weights_read is slot.weights


@pytest.mark.parametrize("shared", [False, True], ids=["inline", "shared"])
@pytest.mark.parametrize("compression", COMPRESSIONS, ids=lambda spec: spec.name)
def test_a_push_of_another_form_is_refused_by_its_header(compression: CompressionSpec, shared: bool) -> None:
    push_format, _, gradient = made(compression, weights=True)
    size = sum(map(len, push_format.payload(gradient, shared)))
    frame = Frame.unpack(push_header(gradient, 0, False, 1, size))
    push_format.check(frame, push_format.sizes(shared))
    for code in {*range(256)} - {frame.code}:
        with pytest.raises(FrameError, match=f"values of code {code}, expected {frame.code}"):
            push_format.check(frame._replace(code=code), push_format.sizes(shared))
    longest = push_format.sizes(shared)[-1]
    with pytest.raises(FrameError, match=f"expected .*{longest}"):
        push_format.check(frame._replace(payload=longest + 1), push_format.sizes(shared))
    if not shared:
        with pytest.raises(FrameError, match="a push has 100 bytes of payload"):
            push_format.check(frame._replace(payload=100), push_format.sizes(shared))


@pytest.mark.parametrize("others", [(), OTHERS], ids=["1 server", "3 servers"])
@pytest.mark.parametrize("weights", [False, True], ids=["plain", "weights"])
@pytest.mark.parametrize("compression", COMPRESSIONS, ids=lambda spec: spec.name)
def test_a_payload_of_any_other_length_is_refused(
    compression: CompressionSpec, weights: bool, others: tuple[Version, ...]
) -> None:
    push_format, _, gradient = made(compression, weights, others=others)
    sent = bytearray(b"".join(push_format.payload(gradient, shared=False)))
    frame = Frame.unpack(push_header(gradient, 0, False, 1, len(sent)))
    for length in range(len(sent)):
        with pytest.raises(FrameError):
            push_format.gradient(frame, memoryview(sent)[:length], "worker-0", None)
    size = 12 * len(others)
    with pytest.raises(FrameError, match=f"has {size + 1} bytes after its vectors, expected {size}"):
        push_format.gradient(frame, memoryview(sent + b"\0"), "worker-0", None)


@pytest.mark.parametrize("compression", COMPRESSIONS[1:], ids=lambda spec: spec.name)
def test_damaged_encoded_payloads_are_refused_or_decoded(compression: CompressionSpec) -> None:
    push_format, _, gradient = made(compression, weights=True)
    good = np.frombuffer(b"".join(push_format.payload(gradient, shared=False)), np.uint8)
    frame = Frame.unpack(push_header(gradient, 0, False, 1, len(good)))
    rng = np.random.default_rng(1)
    out = np.empty(TRAINABLE, "f4")
    refused = 0
    for number in range(1500):
        bad = good.copy()
        end = 16 if number % 2 else len(good)  # damage only the lengths, or any part
        bad[rng.integers(end, size=3)] = rng.integers(256, size=3) if number % 3 else rng.integers(40, size=3)
        try:
            came = push_format.gradient(frame, bad.data, "worker-0", None)
            assert isinstance(came.values, Encoded)
            decode(came.values, out)
        except (EncodingError, FrameError):
            refused += 1
    assert 500 < refused < 1500
