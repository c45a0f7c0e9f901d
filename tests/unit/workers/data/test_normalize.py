from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from sklearn.preprocessing import StandardScaler

from psgd_workers.data import normalize as module
from psgd_workers.data.examples import Examples
from psgd_workers.data.normalize import normalize
from psgd_workers.messages import FloatArray

Normalization = Literal["none", "unit", "standardize"]
Table = list[list[float]]

tables = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2), elements=st.floats(-100, 100, width=16))


def examples(features: NDArray[Any]) -> Examples:
    return Examples(features, np.zeros(len(features), np.int64))


def normalized(kind: Normalization, *parts: NDArray[Any]) -> list[FloatArray]:
    return [part.inputs(slice(None)) for part in normalize(kind, *map(examples, parts))]


@given(tables)
def test_standardize_is_scikit_learns_standard_scaler(table: FloatArray) -> None:
    expected = StandardScaler().fit_transform(table.astype(np.float64))
    normalize("standardize", examples(table))
    np.testing.assert_allclose(table, expected, rtol=1e-5, atol=1e-5)


def test_standardize_brings_each_feature_to_mean_0_and_deviation_1() -> None:
    images = np.random.default_rng(0).normal(3, [[1.0, 5.0], [20.0, 0.1]], (500, 2, 2)).astype(np.float32)
    normalize("standardize", examples(images))
    np.testing.assert_allclose(images.mean(axis=0, dtype=np.float64), np.zeros((2, 2)), atol=1e-6)
    np.testing.assert_allclose(images.std(axis=0, dtype=np.float64), np.ones((2, 2)), rtol=1e-6)


@given(tables)
def test_unit_spans_0_to_1_over_all_features_together(table: FloatArray) -> None:
    low = float(table.min())
    high = float(table.max())
    expected = (table.astype(np.float64) - low) / ((high - low) or 1)
    normalize("unit", examples(table))
    np.testing.assert_allclose(table, expected, rtol=1e-6)
    assert table.min() == 0
    assert table.max() == (1 if high > low else 0)


@pytest.mark.parametrize("kind", ["unit", "standardize"])
@given(value=st.floats(width=32, allow_nan=False, allow_infinity=False), rows=st.integers(1, 50))
def test_constant_features_become_exactly_0(kind: Normalization, value: float, rows: int) -> None:
    table = np.full((rows, 2), value, np.float32)
    normalize(kind, examples(table))
    np.testing.assert_array_equal(table, 0)


@pytest.mark.parametrize(("kind", "expected"), [("none", [[5, 3]]), ("unit", [[2.5, 1.5]]), ("standardize", [[4, 3]])])
def test_the_validation_part_is_transformed_as_the_training_part(kind: Normalization, expected: Table) -> None:
    train = np.array([[0, 1], [2, 2]], np.float32)
    validation = np.array([[5, 3]], np.float32)
    assert normalized(kind, train, validation)[1].tolist() == expected


@pytest.mark.parametrize("kind", ["none", "unit", "standardize"])
@given(pixels=hnp.arrays(np.uint8, st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))))
def test_bytes_become_what_floats_become_bit_for_bit(kind: Normalization, pixels: NDArray[np.uint8]) -> None:
    validation = np.flip(pixels[:2])
    (expected, expected_validation), (train, uint8_validation) = (
        normalize(kind, *(examples(part.astype(dtype)) for part in (pixels, validation)))
        for dtype in (np.float32, np.uint8)
    )
    index = np.array([0, len(pixels) - 1, 0])
    np.testing.assert_array_equal(train.inputs(slice(None)), expected.features, strict=True)
    np.testing.assert_array_equal(train.inputs(index), expected.features[index], strict=True)
    np.testing.assert_array_equal(uint8_validation.inputs(slice(None)), expected_validation.features, strict=True)


@pytest.mark.parametrize("kind", ["none", "unit", "standardize"])
@pytest.mark.parametrize("kept", ["train", "validation"])
def test_one_part_of_bytes_and_one_of_floats_come_to_what_floats_alone_come_to(kind: Normalization, kept: str) -> None:
    rng = np.random.default_rng(0)
    train, validation = (rng.integers(256, size=(rows, 3), dtype=np.uint8) for rows in (20, 10))
    fractions = train / np.float32(7), validation  # values that float32 cannot hold exactly, and uint8
    parts = fractions if kept == "validation" else (train, validation / np.float32(7))
    expected = normalized(kind, *(part.astype(np.float32) for part in parts))
    for part, floats in zip(normalized(kind, *(part.copy() for part in parts)), expected, strict=True):
        assert part.dtype == np.float32
        np.testing.assert_allclose(part, floats, rtol=1e-6, atol=1e-6)


def test_a_large_array_is_done_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    table = np.random.default_rng(1).random((101, 7), np.float32)
    pieces = table.copy()
    normalize("standardize", examples(table))
    monkeypatch.setattr(module, "PIECE_SIZE", 16)
    normalize("standardize", examples(pieces))
    np.testing.assert_allclose(pieces, table, rtol=1e-5, atol=1e-6)
