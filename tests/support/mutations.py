"""Damaged copies of a file, drawn by a seed: tests check that a reader refuses them with a typed error."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

__all__ = ["mutations"]

MOST_CHANGES = 4  # changes of one copy
NESTING = (3, 60, 200, 20_000)  # levels of brackets
VALUES = (  # texts that a reader of JSON, YAML or CSV may take for another type, or for too large a number
    b"null",
    b"true",
    b"[]",
    b"{}",
    b'""',
    b"-1",
    b"0",
    b"1e999",
    b"NaN",
    b"Infinity",
    b"-0.0",
    b'"\\ud800"',
    b"18446744073709551616",
    b"9" * 5_000,
)
WORDS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)  # lengths and counts in binary headers
ENDS = b' \n,:{}[]"'  # bytes between which a value of a text stands

Mutation = Callable[[np.random.Generator, bytes], bytes]


def mutations(original: bytes, number: int, seed: int) -> Iterator[bytes]:
    """Yield damaged copies of a file.

    Each copy has one to four changes: flipped bits, lost, repeated, moved or zeroed slices, other values, other
    lengths, deep nesting. The same arguments yield the same copies.

    Args:
        original: content of the file, binary or text.
        number: number of copies.
        seed: seed of the draws.
    """
    draw = np.random.default_rng([seed, len(original)])
    for _ in range(number):
        damaged = original
        while damaged == original:
            for _ in range(int(draw.integers(1, MOST_CHANGES + 1))):
                change = MUTATIONS[int(draw.integers(len(MUTATIONS)))]
                damaged = change(draw, damaged)
        yield damaged


def _slice(draw: np.random.Generator, data: bytes) -> tuple[int, int]:
    """Return the begin and the end of a slice: short ones as often as long ones."""
    begin = int(draw.integers(len(data) + 1))
    longest = int(min(len(data) - begin, 2.0 ** draw.uniform(0, 20)))
    return begin, begin + int(draw.integers(longest + 1))


def _flip(draw: np.random.Generator, data: bytes) -> bytes:
    """Flip one bit."""
    if not data:
        return b"\x00"
    damaged = bytearray(data)
    damaged[int(draw.integers(len(data)))] ^= 1 << int(draw.integers(8))
    return bytes(damaged)


def _truncate(draw: np.random.Generator, data: bytes) -> bytes:
    """Cut the end off."""
    return data[: int(draw.integers(len(data) + 1))]


def _drop(draw: np.random.Generator, data: bytes) -> bytes:
    """Leave a slice out."""
    begin, end = _slice(draw, data)
    return data[:begin] + data[end:]


def _repeat(draw: np.random.Generator, data: bytes) -> bytes:
    """Repeat a slice in its place."""
    begin, end = _slice(draw, data)
    return data[:end] + data[begin:end] * int(draw.integers(1, 5)) + data[end:]


def _move(draw: np.random.Generator, data: bytes) -> bytes:
    """Copy a slice to another place."""
    begin, end = _slice(draw, data)
    place = int(draw.integers(len(data) + 1))
    return data[:place] + data[begin:end] + data[place:]


def _zero(draw: np.random.Generator, data: bytes) -> bytes:
    """Replace a slice by zeros, as a file has after a power failure."""
    begin, end = _slice(draw, data)
    return data[:begin] + bytes(end - begin) + data[end:]


def _noise(draw: np.random.Generator, data: bytes) -> bytes:
    """Replace a slice by random bytes."""
    begin, end = _slice(draw, data)
    return data[:begin] + draw.bytes(end - begin) + data[end:]


def _word(draw: np.random.Generator, data: bytes) -> bytes:
    """Write an extreme number over 4 or 8 bytes, such as a length in a header."""
    size: int = 4 + 4 * int(draw.integers(2))
    begin = int(draw.integers(min(len(data), 64) + 1)) if draw.random() < 0.5 else int(draw.integers(len(data) + 1))
    word = WORDS[int(draw.integers(len(WORDS)))].to_bytes(8, "little")[:size]
    return data[:begin] + word + data[begin + size :]


def _value(draw: np.random.Generator, data: bytes) -> bytes:
    """Replace one value of a text by a value of another type or size."""
    begin = int(draw.integers(len(data) + 1))
    while 0 < begin < len(data) and data[begin - 1] not in ENDS:
        begin -= 1
    end = begin
    while end < len(data) and data[end] not in ENDS:
        end += 1
    return data[:begin] + VALUES[int(draw.integers(len(VALUES)))] + data[end:]


def _nest(draw: np.random.Generator, data: bytes) -> bytes:
    """Insert many brackets, closed or not."""
    place = int(draw.integers(len(data) + 1))
    opening, closing = ((b"[", b"]"), (b'{"a":', b"}"))[int(draw.integers(2))]
    levels = NESTING[int(draw.integers(len(NESTING)))]
    end = closing * levels if draw.random() < 0.5 else b""
    return data[:place] + opening * levels + b"0" + end + data[place:]


MUTATIONS: tuple[Mutation, ...] = (
    *(_flip, _truncate, _drop, _repeat, _move),
    *(_zero, _noise, _word, _value, _nest),
)
