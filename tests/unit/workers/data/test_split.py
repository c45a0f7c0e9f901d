from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psgd_workers.data.examples import Examples
from psgd_workers.data.split import split_validation
from psgd_workers.errors import DataError

fractions = st.floats(0, 1, exclude_min=True, exclude_max=True)


@given(st.integers(2, 300), fractions, st.integers(0, 2**64))
def test_the_parts_are_disjoint_and_complete_and_neither_is_empty(size: int, fraction: float, seed: int) -> None:
    rows = np.arange(size)
    train, validation = split_validation(Examples(rows[:, np.newaxis].astype(np.float32), rows), fraction, seed)
    np.testing.assert_array_equal(np.sort(np.concatenate([train.labels, validation.labels])), rows)
    assert len(train) >= 1
    assert len(validation) == min(max(round(fraction * size), 1), size - 1)


@given(fractions, st.integers(0, 2**64))
def test_features_stay_with_their_labels_in_the_order_of_the_file(fraction: float, seed: int) -> None:
    rows = np.arange(30)
    for part in split_validation(Examples(rows[:, np.newaxis].astype(np.float32), rows), fraction, seed):
        np.testing.assert_array_equal(part.features[:, 0], part.labels)
        assert np.all(np.diff(part.labels) > 0)


def test_the_seed_decides_and_nothing_else(numbered: Examples) -> None:
    parts = [tuple(split_validation(numbered, 0.3, seed)[1].labels.tolist()) for seed in (0, 0, 1, 2, 3)]
    assert parts[0] == parts[1]
    assert len(set(parts)) == 4


def test_every_example_is_drawn_about_equally_often(numbered: Examples) -> None:
    drawn = np.concatenate([split_validation(numbered, 0.25, seed)[1].labels for seed in range(2000)])
    np.testing.assert_allclose(np.bincount(drawn, minlength=20), 500, atol=100)  # 5 standard deviations


def test_one_example_cannot_be_split() -> None:
    with pytest.raises(DataError, match="drop validation_fraction"):
        split_validation(Examples(np.zeros((1, 1), np.float32), np.zeros(1, np.int64)), 0.5, 0)
