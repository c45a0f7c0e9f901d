from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.preprocessing import StandardScaler

from psgd_workers.datasets import normalize as module
from psgd_workers.datasets.normalize import normalize
from psgd_workers.messages import FloatArray

Normalization = Literal["none", "unit", "standardize"]
Table = list[list[float]]

tables = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2), elements=st.floats(-100, 100, width=16))


@given(tables)
def test_standardize_is_scikit_learns_standard_scaler(table: FloatArray) -> None:
    expected = StandardScaler().fit_transform(table.astype(np.float64))
    normalize("standardize", table)
    np.testing.assert_allclose(table, expected, rtol=1e-5, atol=1e-5)


def test_standardize_brings_each_feature_to_mean_0_and_deviation_1() -> None:
    images = np.random.default_rng(0).normal(3, [[1.0, 5.0], [20.0, 0.1]], (500, 2, 2)).astype(np.float32)
    normalize("standardize", images)
    np.testing.assert_allclose(images.mean(axis=0, dtype=np.float64), np.zeros((2, 2)), atol=1e-6)
    np.testing.assert_allclose(images.std(axis=0, dtype=np.float64), np.ones((2, 2)), rtol=1e-6)


@given(tables)
def test_unit_spans_0_to_1_over_all_features_together(table: FloatArray) -> None:
    low, high = float(table.min()), float(table.max())
    expected = (table.astype(np.float64) - low) / ((high - low) or 1)
    normalize("unit", table)
    np.testing.assert_allclose(table, expected, rtol=1e-6)
    assert table.min() == 0
    assert table.max() == (1 if high > low else 0)


@pytest.mark.parametrize("kind", ["unit", "standardize"])
@given(value=st.floats(width=32, allow_nan=False, allow_infinity=False), rows=st.integers(1, 50))
def test_constant_features_become_exactly_0(kind: Normalization, value: float, rows: int) -> None:
    table = np.full((rows, 2), value, np.float32)
    normalize(kind, table)
    np.testing.assert_array_equal(table, 0)


@pytest.mark.parametrize(("kind", "expected"), [("none", [[5, 3]]), ("unit", [[2.5, 1.5]]), ("standardize", [[4, 3]])])
def test_the_validation_part_is_transformed_as_the_training_part(kind: Normalization, expected: Table) -> None:
    train, validation = np.array([[0, 1], [2, 2]], np.float32), np.array([[5, 3]], np.float32)
    normalize(kind, train, validation)
    assert validation.tolist() == expected


def test_a_large_array_is_done_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    table = np.random.default_rng(1).random((101, 7), np.float32)
    pieces = table.copy()
    normalize("standardize", table)
    monkeypatch.setattr(module, "PIECE", 16)
    normalize("standardize", pieces)
    np.testing.assert_allclose(pieces, table, rtol=1e-5, atol=1e-6)
