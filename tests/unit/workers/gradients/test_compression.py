from __future__ import annotations

import re
from collections.abc import Callable
from math import ceil
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from psgd_workers.errors import EncodingError
from psgd_workers.gradients.compression import (
    INT8_BLOCK,
    INT8_MIN_STEP,
    Compressor,
    ErrorFeedback,
    Fp16,
    Int8,
    ScaledSign,
    TopK,
    build_compressor,
    decode,
)
from psgd_workers.messages import Encoded, FloatArray
from psgd_workers.spec import CompressionSpec

SPEC: TypeAdapter[CompressionSpec] = TypeAdapter(CompressionSpec)
FLOAT32_EPS = 2.0**-23
COMPRESSORS: dict[str, Compressor] = {
    "fp16": Fp16(),
    "top_k": TopK(0.1),
    "scaled_sign": ScaledSign(),
    "int8": Int8(),
}

each_compressor = pytest.mark.parametrize("compressor", COMPRESSORS.values(), ids=COMPRESSORS)
any_compressor = st.sampled_from(list(COMPRESSORS.values()))
ratios = st.floats(0, 1, exclude_min=True)


def vectors(limit: float = 1e6, max_size: int = 40, allow_subnormal: bool = True) -> st.SearchStrategy[FloatArray]:
    """Vectors of moderate values, with many ties and zeros."""
    limit = float(np.float32(limit))
    values = st.one_of(st.floats(-limit, limit, width=32, allow_subnormal=allow_subnormal), st.sampled_from([-1, 0, 1]))
    return hnp.arrays(np.float32, st.integers(1, max_size), elements=values)


def normal(size: int, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).standard_normal(size, dtype=np.float32)


def decoded(encoded: Encoded) -> FloatArray:
    """Decode over NaN, so that values that `decode` does not write are seen."""
    out = np.full(encoded.size, np.nan, np.float32)
    decode(encoded, out)
    return out


def compressed(compressor: Compressor, values: FloatArray) -> FloatArray:
    return decoded(compressor.encode(values))


def squared(values: FloatArray) -> float:
    return float(np.sum(values.astype(np.float64) ** 2))


def error_of(memory: ErrorFeedback) -> FloatArray:
    return memory._error.copy()


def identical(left: FloatArray, right: FloatArray) -> bool:
    return left.tobytes() == right.tobytes()


@each_compressor
@given(st.lists(st.integers(0, 2**32), min_size=1, max_size=8), st.integers(1, 3000))
def test_what_travels_and_what_stays_are_the_gradient_and_what_stayed(
    compressor: Compressor, seeds: list[int], size: int
) -> None:
    memory = ErrorFeedback(compressor, size)
    for seed in seeds:
        gradient = normal(size, seed)
        before = error_of(memory)
        original = gradient.copy()
        wanted = gradient + before
        sent = decoded(memory.encode(gradient))
        memory.taken()
        assert identical(gradient, original)
        assert identical(error_of(memory), wanted - sent)
        bound = FLOAT32_EPS * np.maximum(np.abs(wanted), np.abs(sent))
        assert (np.abs(sent.astype(np.float64) + error_of(memory) - wanted) <= bound).all()


@given(any_compressor, vectors())
def test_encoding_is_deterministic_and_leaves_no_views(compressor: Compressor, values: FloatArray) -> None:
    original = values.copy()
    first = compressor.encode(values)
    second = compressor.encode(values.copy())
    assert identical(values, original)
    for left, right in zip(first.arrays, second.arrays, strict=True):
        assert left.tobytes() == right.tobytes()
        assert not np.shares_memory(left, values)


@given(vectors(), ratios)
def test_top_k_contracts_by_its_share(values: FloatArray, ratio: float) -> None:
    encoded = TopK(ratio).encode(values)
    count = max(1, ceil(ratio * len(values)))
    assert len(encoded.arrays[0]) == count
    left_out = squared(decoded(encoded) - values)
    assert left_out <= (1 - count / len(values)) * squared(values) * (1 + 1e-12)


@given(vectors(), ratios)
def test_top_k_is_the_head_of_a_stable_sort(values: FloatArray, ratio: float) -> None:
    indices, picked = TopK(ratio).encode(values).arrays
    order = np.argsort(-np.abs(values), kind="stable")[: len(indices)]
    np.testing.assert_array_equal(indices, np.sort(order))
    np.testing.assert_array_equal(picked, values[indices])


@given(vectors(allow_subnormal=False))
def test_scaled_sign_leaves_exactly_its_share(values: FloatArray) -> None:
    values[0] = 1.0  # something other than zeros, whose share is not defined
    length = squared(values)
    share = 1 - float(np.abs(values).sum(dtype=np.float64)) ** 2 / (len(values) * length)
    difference = compressed(ScaledSign(), values).astype(np.float64) - values
    assert np.sum(difference**2) / length == pytest.approx(share, abs=1e-5)


def test_scaled_sign_takes_zero_as_positive() -> None:
    np.testing.assert_array_equal(
        compressed(ScaledSign(), np.array([0, -0.0, -3, 3], np.float32)), [1.5, 1.5, -1.5, 1.5]
    )


@given(vectors(65504.0))
def test_fp16_is_relatively_precise(values: FloatArray) -> None:
    error = np.abs(compressed(Fp16(), values) - values)
    assert (error <= np.maximum(2.0**-11 * np.abs(values), 2.0**-25)).all()


def test_fp16_saturates_and_the_rest_follows() -> None:
    memory = ErrorFeedback(Fp16(), 2)
    sent = []
    for gradient in ([150000.0, -1e6], [0.0, 0.0], [0.0, 0.0]):
        sent.append(decoded(memory.encode(np.array(gradient, np.float32))))
        memory.taken()
    np.testing.assert_array_equal(sent, [[65504, -65504], [65504, -65504], [18992, -65504]])
    assert memory.norm == 1e6 - 3 * 65504


@given(vectors(3e38, max_size=20), st.integers(0, 2**32))
def test_int8_errs_by_half_a_step_of_its_block_at_most(values: FloatArray, seed: int) -> None:
    tail = normal(2 * INT8_BLOCK, seed) * np.float32(1e-30)  # the first block's large values must not coarsen these
    values = np.concatenate([values, tail])
    encoded = Int8().encode(values)
    steps = np.repeat(encoded.arrays[0], INT8_BLOCK)[: len(values)].astype(np.float64)
    largest = [np.abs(values[start : start + INT8_BLOCK]).max() for start in range(0, len(values), INT8_BLOCK)]
    np.testing.assert_allclose(encoded.arrays[0], np.maximum(np.array(largest) / 127, INT8_MIN_STEP), rtol=1e-6)
    error = np.abs(decoded(encoded).astype(np.float64) - values)
    assert (error <= steps * (0.5 + 127 * FLOAT32_EPS)).all()


@given(hnp.arrays(np.float32, 5, elements=st.floats(-(2.0**-123), 2.0**-123, width=32)))
def test_int8_is_as_precise_on_values_near_the_smallest(values: FloatArray) -> None:
    encoded = Int8().encode(values)
    assert (np.abs(decoded(encoded) - values) <= encoded.arrays[0] * np.float32(0.501)).all()


@each_compressor
def test_a_vector_of_zeros_comes_back(compressor: Compressor) -> None:
    np.testing.assert_array_equal(compressed(compressor, np.zeros(1500, np.float32)), np.zeros(1500))


@pytest.mark.parametrize(
    ("compressor", "nbytes"),
    [
        (Fp16(), 20_000),
        (TopK(0.1), 1_000 * (4 + 4)),
        (TopK(1e-9), 4 + 4),
        (ScaledSign(), 4 + 1_250),
        (Int8(), 10_000 + 4 * 10),
    ],
)
def test_sizes(compressor: Compressor, nbytes: int) -> None:
    encoded = compressor.encode(normal(10_000))
    assert encoded.size == 10_000
    assert encoded.nbytes == nbytes


@pytest.mark.parametrize(("size", "nbytes"), [(1, 4 + 1), (8, 4 + 1), (9, 4 + 2)])
def test_a_scaled_sign_gradient_may_end_within_a_byte(size: int, nbytes: int) -> None:
    encoded = ScaledSign().encode(normal(size))
    assert encoded.nbytes == nbytes
    np.testing.assert_array_equal(np.sign(decoded(encoded)), np.sign(normal(size)))


@each_compressor
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_refused_push_that_is_not_finite_leaves_no_trace(compressor: Compressor, bad: float) -> None:
    memory = ErrorFeedback(compressor, 40)
    memory.encode(normal(40))
    memory.taken()
    before = error_of(memory)
    for spoiled in (np.full(40, bad, np.float32), np.where(np.arange(40) == 7, np.float32(bad), normal(40))):
        encoded = memory.encode(spoiled)
        decoded(encoded)  # does not warn
        assert encoded.nbytes == compressor.encode(normal(40)).nbytes
        memory.refused()
        assert identical(error_of(memory), before)
    memory.encode(normal(40))
    memory.taken()
    assert np.isfinite(memory.norm)


@each_compressor
def test_a_push_that_is_not_finite_cannot_be_taken(compressor: Compressor) -> None:
    memory = ErrorFeedback(compressor, 4)
    memory.encode(np.array([1, np.nan, 2, 3], np.float32))
    with pytest.raises(AssertionError, match="not finite was taken"):
        memory.taken()


@given(any_compressor, st.lists(st.booleans(), max_size=8))
def test_refusals_leave_the_memory_as_if_they_had_not_been(compressor: Compressor, fates: list[bool]) -> None:
    memory = ErrorFeedback(compressor, 30)
    undisturbed = ErrorFeedback(compressor, 30)
    for seed, taken in enumerate(fates):
        memory.encode(normal(30, seed))
        if not taken:
            memory.refused()
            continue
        memory.taken()
        undisturbed.encode(normal(30, seed))
        undisturbed.taken()
    assert identical(error_of(memory), error_of(undisturbed))


def test_the_norm_is_of_what_was_taken() -> None:
    memory = ErrorFeedback(TopK(0.3), 3)
    assert memory.norm == 0
    memory.encode(np.array([3, 9, -4], np.float32))
    assert memory.norm == 0
    memory.taken()
    assert memory.norm == 5


def test_every_push_is_answered_once() -> None:
    memory = ErrorFeedback(Fp16(), 3)
    for answer in (memory.taken, memory.refused):
        with pytest.raises(AssertionError, match="no push is under way"):
            answer()
        memory.encode(normal(3))
        with pytest.raises(AssertionError, match="neither taken nor refused"):
            memory.encode(normal(3))
        answer()
        with pytest.raises(AssertionError, match="no push is under way"):
            answer()


def uint32(*values: int) -> NDArray[np.uint32]:
    return np.array(values, np.uint32)


HALVES = np.zeros(9, np.float16)
SCALE = np.ones(1, np.float32)
BITS = np.zeros(2, np.uint8)
MULTIPLES = np.zeros(9, np.int8)
TWO = np.ones(2, np.float32)
MALFORMED = {
    "unknown kind": (Encoded("gzip", 9, (HALVES,)), "compressed as 'gzip', expected one of fp16, top_k, scaled_sign"),
    "too short for the slice": (Encoded("fp16", 8, (HALVES[:8],)), "fp16 gradient has 8 values, expected 9"),
    "fp16 without arrays": (Encoded("fp16", 9, ()), "has no arrays, expected float16[9]"),
    "fp16 with an array too many": (Encoded("fp16", 9, (HALVES, HALVES)), "has float16[9], float16[9], expected"),
    "fp16 of other length": (Encoded("fp16", 9, (HALVES[:8],)), "has float16[8], expected float16[9]"),
    "fp16 of one value": (Encoded("fp16", 9, (HALVES[:1],)), "has float16[1], expected float16[9]"),
    "fp16 of other type": (Encoded("fp16", 9, (MULTIPLES,)), "has int8[9], expected float16[9]"),
    "fp16 of other byte order": (Encoded("fp16", 9, (HALVES.astype(">f2"),)), "has >f2[9], expected float16[9]"),
    "fp16 of other shape": (Encoded("fp16", 9, (HALVES[:, None],)), "has float16[9, 1], expected float16[9]"),
    "top_k with more values": (Encoded("top_k", 9, (uint32(1), TWO)), "has 1 indices for 2 values"),
    "top_k beyond the slice": (Encoded("top_k", 9, (uint32(1, 9), TWO)), "has index 9, expected one below 9"),
    "top_k unsorted": (Encoded("top_k", 9, (uint32(9, 1), TWO)), "not strictly ascending"),
    "top_k twice": (Encoded("top_k", 9, (uint32(3, 3), TWO)), "not strictly ascending"),
    "top_k signed": (Encoded("top_k", 9, (np.array([-1, 2]), TWO)), "has int64[2], float32[2], expected uint32[k]"),
    "top_k in float64": (Encoded("top_k", 9, (uint32(1, 2), np.ones(2))), "has uint32[2], float64[2], expected"),
    "sign without scale": (Encoded("scaled_sign", 9, (BITS,)), "has uint8[2], expected float32[1], uint8[2]"),
    "sign with two scales": (Encoded("scaled_sign", 9, (TWO, BITS)), "has float32[2], uint8[2], expected"),
    "sign with few bits": (Encoded("scaled_sign", 9, (SCALE, BITS[:1])), "has float32[1], uint8[1], expected"),
    "sign unpacked": (Encoded("scaled_sign", 9, (SCALE, BITS > 0)), "has float32[1], bool[2], expected"),
    "int8 with two steps": (Encoded("int8", 9, (TWO, MULTIPLES)), "has float32[2], int8[9], expected float32[1]"),
    "int8 unsigned": (Encoded("int8", 9, (SCALE, MULTIPLES.view(np.uint8))), "has float32[1], uint8[9], expected"),
    "int8 too long": (Encoded("int8", 9, (SCALE, np.zeros(10, np.int8))), "has float32[1], int8[10], expected"),
}


@pytest.mark.parametrize(("encoded", "message"), MALFORMED.values(), ids=MALFORMED)
def test_decode_refuses_what_does_not_fit(encoded: Encoded, message: str) -> None:
    out = np.full(9, 7, np.float32)
    with pytest.raises(EncodingError, match=re.escape(message)):
        decode(encoded, out)
    np.testing.assert_array_equal(out, np.full(9, 7))


def test_top_k_of_nothing_is_zeros() -> None:
    np.testing.assert_array_equal(decoded(Encoded("top_k", 9, (uint32(), TWO[:0]))), np.zeros(9))


@each_compressor
def test_decode_refuses_another_partitions_gradient(compressor: Compressor) -> None:
    encoded = compressor.encode(normal(12))
    with pytest.raises(EncodingError, match="has 12 values, expected 9"):
        decode(encoded, np.empty(9, np.float32))


def descend(
    gradient_at: Callable[[FloatArray, int], FloatArray],
    weights: FloatArray,
    compressor: Compressor,
    lr: float,
    steps: int,
    feedback: bool,
) -> FloatArray:
    """Run SGD, with the error memory or without it, and return the weights."""
    memory = ErrorFeedback(compressor, len(weights))
    for step in range(steps):
        gradient = gradient_at(weights, step)
        if feedback:
            update = decoded(memory.encode(gradient))
            memory.taken()
        else:
            update = compressed(compressor, gradient)
        weights = weights - np.float32(lr) * update
    return weights


def test_top_k_needs_the_memory_where_one_noisy_value_hides_the_rest() -> None:
    def gradient_at(weights: FloatArray, step: int) -> FloatArray:
        gradient = weights.copy()
        gradient[0] += 5.0 if step % 2 else -5.0  # of mean zero, and always the largest
        return gradient

    start = np.ones(10, np.float32)
    alone = descend(gradient_at, start, TopK(0.1), lr=0.01, steps=3000, feedback=False)
    repaid = descend(gradient_at, start, TopK(0.1), lr=0.01, steps=3000, feedback=True)
    np.testing.assert_array_equal(alone[1:], start[1:])
    assert np.abs(repaid).max() < 0.1


def test_scaled_sign_needs_the_memory_where_every_sign_is_the_same() -> None:
    """Karimireddy et al., 2019, section 3: every example's signs are ±(1, -1), so w₁ + w₂ never moves from 2 to 0."""
    examples = np.array([[1, -2], [2, -1]], np.float32)

    def gradient_at(weights: FloatArray, step: int) -> FloatArray:
        row: FloatArray = examples[step % 2]
        gradient: FloatArray = row * (row @ weights)
        return gradient

    def loss(weights: FloatArray) -> float:
        return squared(examples @ weights) / 2

    start = np.ones(2, np.float32)
    alone = descend(gradient_at, start, ScaledSign(), lr=0.02, steps=2000, feedback=False)
    repaid = descend(gradient_at, start, ScaledSign(), lr=0.02, steps=2000, feedback=True)
    assert loss(alone) > 0.99 * loss(start)
    assert loss(repaid) < 1e-6


@pytest.mark.parametrize(
    ("fields", "built"),
    [
        ({"name": "none"}, None),
        ({"name": "fp16"}, Fp16),
        ({"name": "top_k", "ratio": 0.5}, TopK),
        ({"name": "scaled_sign"}, ScaledSign),
        ({"name": "int8"}, Int8),
    ],
)
def test_the_spec_says_which(fields: dict[str, Any], built: type[Any] | None) -> None:
    compressor = build_compressor(SPEC.validate_python(fields))
    if built is None:
        assert compressor is None
        return
    assert isinstance(compressor, built)
    assert compressor.encode(normal(4)).kind == fields["name"]


def test_the_ratio_of_the_spec_is_kept() -> None:
    compressor = build_compressor(SPEC.validate_python({"name": "top_k", "ratio": 0.25}))
    assert compressor is not None
    assert len(compressor.encode(normal(8)).arrays[0]) == 2


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01])
def test_a_ratio_outside_its_range_is_refused(ratio: float) -> None:
    with pytest.raises(ValidationError, match="ratio"):
        SPEC.validate_python({"name": "top_k", "ratio": ratio})
