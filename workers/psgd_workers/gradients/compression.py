"""Gradient compression with error feedback: what a compressor leaves out of one push goes into the next.

p = g + e;  c = C(p) travels;  e ← p - c.  The learning rate stays on the server. A biased compressor (top-k, sign) may
stall or diverge by itself; with the error memory e it converges like plain SGD, to first order.

References:
    Seide et al., "1-Bit Stochastic Gradient Descent and its Application to Data-Parallel Distributed Training of
    Speech DNNs", Interspeech 2014; Stich et al., "Sparsified SGD with Memory", NeurIPS 2018; Karimireddy et al.,
    "Error Feedback Fixes SignSGD and other Gradient Compression Schemes", ICML 2019.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from psgd_workers.errors import EncodingError
from psgd_workers.messages import Encoded, FloatArray
from psgd_workers.spec import (
    CompressionSpec,
    Fp16Compression,
    Int8Compression,
    NoCompression,
    ScaledSignCompression,
    TopKCompression,
)

__all__ = [
    "ARRAYS",
    "Compressor",
    "ErrorFeedback",
    "Fp16",
    "Int8",
    "ScaledSign",
    "TopK",
    "build_compressor",
    "decode",
]

FP16_MAX = 65504.0  # the largest finite float16
INT8_MAX = 127
INT8_BLOCK = 1024  # values per step size: more → fewer bytes, and one large value coarsens more of its neighbours
INT8_MIN_STEP = np.finfo(np.float32).tiny  # the smallest float32 of full precision


class Compressor(Protocol):
    """Encodes slices; keeps nothing, so one may serve many slices."""

    def encode(self, values: FloatArray) -> Encoded:
        """Compress.

        Args:
            values: `[size]` with size ≥ 1, left as they are. If some are not finite, this neither raises nor warns,
                and what is encoded has no meaning: whoever pushes it must have it refused.

        Returns:
            New arrays, none of them a view of `values`.
        """


class Fp16:
    """IEEE half precision: half the bytes. Arrays: the values `[size]` float16.

    |C(v) - v| ≤ 2⁻¹¹·|v| per value of magnitude 2⁻¹⁴ to 65504, and ≤ 2⁻²⁵ below.
    """

    @np.errstate(invalid="ignore")
    def encode(self, values: FloatArray) -> Encoded:
        """Round each value to the nearest float16."""
        # Beyond ±65504 float16 has only inf, which would poison the weights and the error memory alike. Saturated, the
        # value's remainder is finite: it stays in the memory and follows with the next pushes.
        halves = values.clip(-FP16_MAX, FP16_MAX).astype(np.float16)
        return Encoded("fp16", values.size, (halves,))

    @staticmethod
    def decode(encoded: Encoded, out: FloatArray) -> None:
        (halves,) = _checked(encoded, (np.float16, encoded.size))
        out[:] = halves


class TopK:
    """The largest values, the rest as 0. Arrays: indices `[k]` uint32, ascending; the values there `[k]` float32.

    ‖C(v) - v‖² ≤ (1 - k/d)·‖v‖² with k = max(1, ⌈ratio·d⌉) of d values.

    Args:
        ratio: share of the values that travel, in (0, 1]. A value travels in 8 bytes: above ½, nothing is saved.
    """

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio

    @np.errstate(invalid="ignore")
    def encode(self, values: FloatArray) -> Encoded:
        """Pick the k values of largest magnitude; of equal ones, those that come first."""
        count = max(1, ceil(self._ratio * values.size))
        # We partition values, not indices: which of equal values argpartition picks depends on the CPU's vector units.
        magnitudes = np.fmin(np.abs(values), np.inf)  # nan counts as inf, or there would be no k largest
        place = values.size - count
        threshold = np.partition(magnitudes, place)[place]
        picked = magnitudes > threshold
        picked[np.flatnonzero(magnitudes == threshold)[: count - np.count_nonzero(picked)]] = True
        indices = np.flatnonzero(picked)
        return Encoded("top_k", values.size, (indices.astype(np.uint32), values[indices]))

    @staticmethod
    def decode(encoded: Encoded, out: FloatArray) -> None:
        indices, values = _checked(encoded, (np.uint32, None), (np.float32, None))
        if len(indices) != len(values):
            raise EncodingError(f"a top_k gradient came with {len(indices)} indices for {len(values)} values")
        if not (indices[1:] > indices[:-1]).all():
            raise EncodingError("a top_k gradient's indices are not strictly ascending")
        if len(indices) and indices[-1] >= out.size:
            raise EncodingError(f"a top_k gradient has index {indices[-1]}, expected one below {out.size}")
        out[:] = 0
        out[indices] = values


class ScaledSign:
    """One bit per value. Arrays: the scale `[1]` float32; the signs `[⌈size/8⌉]` uint8, packed, 1 for +.

    C(v) = (‖v‖₁/d)·sign v, so ‖C(v) - v‖² = (1 - ‖v‖₁²/(d·‖v‖²))·‖v‖². Here sign 0 is +, as a bit has no third value;
    the equality needs every |sign v| to be 1.
    """

    @np.errstate(over="ignore", invalid="ignore")
    def encode(self, values: FloatArray) -> Encoded:
        """Take the mean magnitude, and each value's sign."""
        scale = np.abs(values).mean(dtype=np.float64)  # a float32 sum of large finite values may overflow
        return Encoded("scaled_sign", values.size, (np.array([scale], np.float32), np.packbits(values >= 0)))

    @staticmethod
    def decode(encoded: Encoded, out: FloatArray) -> None:
        (scale,), bits = _checked(encoded, (np.float32, 1), (np.uint8, -(-encoded.size // 8)))
        out[:] = np.where(np.unpackbits(bits, count=encoded.size), scale, -scale)


class Int8:
    """A quarter of the bytes. Arrays: the steps `[⌈size/1024⌉]` float32, one per block; multiples `[size]` int8.

    C(v) = s·round(v/s) with s = max|v|/127 over the value's block: |C(v) - v| ≤ s/2. Rounding is to the nearest, ties
    to even: the same values give the same bits. Single values are rounded with a bias, which error feedback repays.
    """

    @np.errstate(over="ignore", invalid="ignore")
    def encode(self, values: FloatArray) -> Encoded:
        """Round each value to a multiple of its block's step."""
        largest = np.maximum.reduceat(np.abs(values), np.arange(0, values.size, INT8_BLOCK))
        # The lower bound serves a block of zeros, and of values whose step float32 could not hold precisely.
        steps = np.maximum(largest / np.float32(INT8_MAX), INT8_MIN_STEP)
        multiples = np.rint(values / _per_value(steps, values.size)).astype(np.int8)
        return Encoded("int8", values.size, (steps, multiples))

    @staticmethod
    def decode(encoded: Encoded, out: FloatArray) -> None:
        steps, multiples = _checked(encoded, (np.float32, -(-encoded.size // INT8_BLOCK)), (np.int8, encoded.size))
        np.multiply(_per_value(steps, encoded.size), multiples, out=out)


ARRAYS: dict[str, tuple[np.dtype[Any], ...]] = {  # that each kind travels as
    "fp16": (np.dtype(np.float16),),
    "top_k": (np.dtype(np.uint32), np.dtype(np.float32)),
    "scaled_sign": (np.dtype(np.float32), np.dtype(np.uint8)),
    "int8": (np.dtype(np.float32), np.dtype(np.int8)),
}
DECODERS: dict[str, Callable[[Encoded, FloatArray], None]] = {
    "fp16": Fp16.decode,
    "top_k": TopK.decode,
    "scaled_sign": ScaledSign.decode,
    "int8": Int8.decode,
}


@np.errstate(over="ignore", invalid="ignore")
def decode(encoded: Encoded, out: FloatArray) -> None:
    """Write the values that `encoded` stands for.

    Args:
        encoded: from the wire: all of its form is checked before anything is written. Its values are not; whether a
            gradient is finite is told by its norm.
        out: `[encoded.size]`, overwritten.

    Raises:
        EncodingError: the kind is unknown, or sizes, dtypes or indices do not fit it or `out`.
    """
    decoder = DECODERS.get(encoded.kind)
    if decoder is None:
        raise EncodingError(f"a gradient came compressed as {encoded.kind!r}, expected one of {', '.join(DECODERS)}")
    if encoded.size != out.size:
        raise EncodingError(f"a {encoded.kind} gradient of {encoded.size} values came for a slice of {out.size}")
    decoder(encoded, out)


class ErrorFeedback:
    """The error memory of one worker for one partition's slice: a worker's only state.

    Each `encode` is answered by `taken()` or `refused()`, as the push's receipt says, before the next. A push that is
    not finite must be refused (a server rejects it by its norm), so that what came of it never enters the memory.

    Args:
        compressor: C.
        size: length of the slice.

    Example:
        >>> memory = ErrorFeedback(TopK(0.5), size=2)
        >>> memory.encode(np.array([3, 1], np.float32)).arrays[1].tolist()
        [3.0]
        >>> memory.taken()
        >>> memory.norm
        1.0
    """

    def __init__(self, compressor: Compressor, size: int) -> None:
        self._compressor = compressor
        self._error = np.zeros(size, np.float32)  # e
        self._wanted = np.empty(size, np.float32)  # p
        self._next_error = np.empty(size, np.float32)  # p - c, while a push is under way
        self._under_way = False

    @property
    def norm(self) -> float:
        """Euclidean norm of the memory: how much gradient was computed and has not travelled."""
        with np.errstate(over="ignore"):
            return float(np.linalg.norm(self._error))

    def encode(self, gradient: FloatArray) -> Encoded:
        """Compress the gradient and what earlier pushes left out.

        p = g + e;  c = C(p);  p - c becomes e if the push is taken.

        Args:
            gradient: `[size]`, left as it is.

        Returns:
            c, in new arrays.
        """
        assert not self._under_way, "the last push was neither taken nor refused"
        with np.errstate(over="ignore", invalid="ignore"):
            np.add(gradient, self._error, out=self._wanted)
            encoded = self._compressor.encode(self._wanted)
            decode(encoded, self._next_error)
            np.subtract(self._wanted, self._next_error, out=self._next_error)
        self._under_way = True
        return encoded

    def taken(self) -> None:
        """The push is in the server's state, or will be: keep what it left out."""
        assert self._under_way, "no push is under way"
        assert np.isfinite(self._next_error).all(), "a push that is not finite was taken"
        self._error, self._next_error = self._next_error, self._error
        self._under_way = False

    def refused(self) -> None:
        """The push is lost, its batch maybe to come again: the memory stays as it was before it."""
        assert self._under_way, "no push is under way"
        self._under_way = False


def build_compressor(spec: CompressionSpec) -> Compressor | None:
    """The compressor that `spec` describes; None if gradients travel as they are."""
    match spec:
        case NoCompression():
            return None
        case Fp16Compression():
            return Fp16()
        case TopKCompression():
            return TopK(spec.ratio)
        case ScaledSignCompression():
            return ScaledSign()
        case Int8Compression():
            return Int8()


def _checked(encoded: Encoded, *expected: tuple[type[np.generic], int | None]) -> tuple[NDArray[Any], ...]:
    """The arrays, if they are of these dtypes and lengths; None is any length."""
    came = [(array.dtype, array.shape) for array in encoded.arrays]
    fits = len(came) == len(expected) and all(
        dtype == np.dtype(kind) and len(shape) == 1 and length in (None, shape[0])
        for (dtype, shape), (kind, length) in zip(came, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join(f"{kind.__name__}[{'k' if length is None else length}]" for kind, length in expected)
        found = ", ".join(f"{dtype}{list(shape)}" for dtype, shape in came) or "nothing"
        raise EncodingError(f"a {encoded.kind} gradient of {encoded.size} values came as {found}, expected {wanted}")
    return encoded.arrays


def _per_value(steps: FloatArray, size: int) -> FloatArray:
    return np.repeat(steps, INT8_BLOCK)[:size]
