"""Gradient compression with error feedback: the error of one push is added to the next gradient.

p = g + e;  c = C(p) is sent;  e ← p - c.  The learning rate stays on the server. A biased compressor (top-k, sign) may
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

from psgd_workers.counting import counted
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
    """Encodes slices of gradients. It has no state, so one compressor may encode many slices."""

    def encode(self, values: FloatArray) -> Encoded:
        """Compress a slice.

        Args:
            values: gradient `[size]`, float32, with size ≥ 1; not changed. If some values are not finite, this neither
                raises nor warns, and the result has no meaning: the server must refuse such a push by its norm.

        Returns:
            The compressed slice, in new arrays that are no views of `values`.
        """


class Fp16:
    """IEEE half precision, with half the bytes.

    Arrays: the values `[size]`, float16.

    |C(v) - v| ≤ 2⁻¹¹·|v| per value of magnitude 2⁻¹⁴ to 65504, and ≤ 2⁻²⁵ below.
    """

    @np.errstate(invalid="ignore")
    def encode(self, values: FloatArray) -> Encoded:
        """Round each value to the nearest float16; see `Compressor.encode`."""
        # Beyond ±65504 float16 has only inf, which would spoil both the weights and the error memory. A clipped value
        # leaves a finite error, which stays in the memory and is sent with the next pushes.
        halves = values.clip(-FP16_MAX, FP16_MAX).astype(np.float16)
        return Encoded("fp16", values.size, (halves,))

    @staticmethod
    def decode(encoded: Encoded, out: FloatArray) -> None:
        (halves,) = _checked(encoded, (np.float16, encoded.size))
        out[:] = halves


class TopK:
    """The k values of largest magnitude; all others become 0.

    Arrays: the indices `[k]`, uint32, ascending; the values at these indices `[k]`, float32.

    ‖C(v) - v‖² ≤ (1 - k/d)·‖v‖² with k = max(1, ⌈ratio·d⌉) of d values.

    Args:
        ratio: share of the values that are sent, in (0, 1]. Lower → fewer bytes, larger error. One value takes 8 bytes,
            so that a ratio above ½ saves nothing.
    """

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio

    @np.errstate(invalid="ignore")
    def encode(self, values: FloatArray) -> Encoded:
        """Pick the k values of largest magnitude, and the first ones among equal values; see `Compressor.encode`."""
        count = max(1, ceil(self._ratio * values.size))
        # Not argpartition: which of several equal values it picks depends on the CPU's vector units.
        magnitudes = np.fmin(np.abs(values), np.inf)  # nan counts as inf, so that there always are k largest values
        position = values.size - count
        threshold = np.partition(magnitudes, position)[position]
        picked = magnitudes > threshold
        picked[np.flatnonzero(magnitudes == threshold)[: count - np.count_nonzero(picked)]] = True
        indices = np.flatnonzero(picked)
        return Encoded("top_k", values.size, (indices.astype(np.uint32), values[indices]))

    @staticmethod
    def decode(encoded: Encoded, out: FloatArray) -> None:
        indices, values = _checked(encoded, (np.uint32, None), (np.float32, None))
        if len(indices) != len(values):
            raise EncodingError(f"a top_k gradient has {len(indices)} indices for {counted(len(values), 'value')}")
        if not (indices[1:] > indices[:-1]).all():
            raise EncodingError("the indices of a top_k gradient are not strictly ascending")
        if len(indices) and indices[-1] >= out.size:
            raise EncodingError(f"a top_k gradient has index {indices[-1]}, expected one below {out.size}")
        out[:] = 0
        out[indices] = values


class ScaledSign:
    """The sign of each value times their mean magnitude, with one bit per value.

    Arrays: the scale `[1]`, float32; the signs `[⌈size/8⌉]`, uint8, packed, with bit 1 for +.

    C(v) = (‖v‖₁/d)·sign v of d values, so ‖C(v) - v‖² = (1 - ‖v‖₁²/(d·‖v‖²))·‖v‖². The sign of 0 is +, because one bit
    has two values; the equality needs |sign v| = 1 everywhere.
    """

    @np.errstate(over="ignore", invalid="ignore")
    def encode(self, values: FloatArray) -> Encoded:
        """Take the mean magnitude and the sign of each value; see `Compressor.encode`."""
        scale = np.abs(values).mean(dtype=np.float64)  # a float32 sum of large finite values may overflow
        return Encoded("scaled_sign", values.size, (np.array([scale], np.float32), np.packbits(values >= 0)))

    @staticmethod
    def decode(encoded: Encoded, out: FloatArray) -> None:
        (scale,), bits = _checked(encoded, (np.float32, 1), (np.uint8, -(-encoded.size // 8)))
        out[:] = np.where(np.unpackbits(bits, count=encoded.size), scale, -scale)


class Int8:
    """Whole multiples of a step size for each block of 1024 values, with a quarter of the bytes.

    Arrays: the step sizes `[⌈size/1024⌉]`, float32; the multiples `[size]`, int8.

    C(v) = s·round(v/s) with s = max|v|/127 over the block of the value, so |C(v) - v| ≤ s/2. Rounding is to nearest,
    ties to even, so that the same values give the same bits. It is biased for a single value; error feedback corrects
    that.
    """

    @np.errstate(over="ignore", invalid="ignore")
    def encode(self, values: FloatArray) -> Encoded:
        """Round each value to a multiple of its block's step size; see `Compressor.encode`."""
        largest = np.maximum.reduceat(np.abs(values), np.arange(0, values.size, INT8_BLOCK))
        # The lower bound avoids a division by zero in a block of zeros, and step sizes that float32 holds imprecisely.
        steps = np.maximum(largest / np.float32(INT8_MAX), INT8_MIN_STEP)
        multiples = np.rint(values / _per_value(steps, values.size)).astype(np.int8)
        return Encoded("int8", values.size, (steps, multiples))

    @staticmethod
    def decode(encoded: Encoded, out: FloatArray) -> None:
        steps, multiples = _checked(encoded, (np.float32, -(-encoded.size // INT8_BLOCK)), (np.int8, encoded.size))
        np.multiply(_per_value(steps, encoded.size), multiples, out=out)


ARRAYS: dict[str, tuple[np.dtype[Any], ...]] = {  # dtypes of the arrays by compression
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
    """Decode a compressed slice.

    Args:
        encoded: slice as it was received. Its sizes, dtypes and indices are checked before anything is written. Its
            values are not checked: a gradient that is not finite is recognised by its norm.
        out: vector `[encoded.size]`, float32, that is overwritten.

    Raises:
        EncodingError: the compression is unknown, or sizes, dtypes or indices are not valid for it or for `out`.
    """
    decoder = DECODERS.get(encoded.kind)
    if decoder is None:
        raise EncodingError(f"a gradient is compressed as {encoded.kind!r}, expected one of {', '.join(DECODERS)}")
    if encoded.size != out.size:
        raise EncodingError(f"a {encoded.kind} gradient has {counted(encoded.size, 'value')}, expected {out.size}")
    decoder(encoded, out)


class ErrorFeedback:
    """The error memory of one worker's slot for one partition: the only state that a worker keeps.

    After each `encode`, and before the next, the caller calls `taken` or `refused`, as the receipt of the push says. A
    push that is not finite must be refused (a server rejects it by its norm): its error must not enter the memory.

    Args:
        compressor: the compressor C.
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
        self._error = np.zeros(size, np.float32)  # e: values that no push has carried yet
        self._corrected = np.empty(size, np.float32)  # p = g + e
        self._next_error = np.empty(size, np.float32)  # p - c, of the push that has no outcome yet
        self._under_way = False

    @property
    def norm(self) -> float:
        """Return the Euclidean norm of e: of the values that were computed and that no push has carried yet."""
        with np.errstate(over="ignore"):
            return float(np.linalg.norm(self._error))

    def encode(self, gradient: FloatArray) -> Encoded:
        """Compress the sum of a gradient and the error of the earlier pushes.

        p = g + e;  c = C(p);  p - c becomes e if the push is taken.

        Args:
            gradient: g, `[size]`, float32; not changed.

        Returns:
            c, in new arrays.
        """
        assert not self._under_way, "the last push was neither taken nor refused"
        with np.errstate(over="ignore", invalid="ignore"):
            np.add(gradient, self._error, out=self._corrected)
            encoded = self._compressor.encode(self._corrected)
            decode(encoded, self._next_error)
            np.subtract(self._corrected, self._next_error, out=self._next_error)
        self._under_way = True
        return encoded

    def taken(self) -> None:
        """Keep the error of the last push: the server's state contains the push."""
        assert self._under_way, "no push is under way"
        assert np.isfinite(self._next_error).all(), "a push that is not finite was taken"
        self._error, self._next_error = self._next_error, self._error
        self._under_way = False

    def refused(self) -> None:
        """Forget the error of the last push: the server's state does not contain the push, or that is in doubt."""
        assert self._under_way, "no push is under way"
        self._under_way = False


def build_compressor(spec: CompressionSpec) -> Compressor | None:
    """Return the compressor that `spec` describes; None if gradients are not compressed."""
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
    """Return the arrays. Raise EncodingError if a dtype or a length is not the expected one; None allows any length."""
    found = [(array.dtype, array.shape) for array in encoded.arrays]
    fits = len(found) == len(expected) and all(
        dtype == np.dtype(kind) and len(shape) == 1 and length in (None, shape[0])
        for (dtype, shape), (kind, length) in zip(found, expected, strict=True)
    )
    if not fits:
        expected_text = ", ".join(f"{kind.__name__}[{'k' if length is None else length}]" for kind, length in expected)
        found_text = ", ".join(f"{dtype}{list(shape)}" for dtype, shape in found) or "no arrays"
        raise EncodingError(
            f"a {encoded.kind} gradient of {counted(encoded.size, 'value')} has {found_text}, expected {expected_text}"
        )
    return encoded.arrays


def _per_value(steps: FloatArray, size: int) -> FloatArray:
    """Return the step size of each value's block."""
    return np.repeat(steps, INT8_BLOCK)[:size]
