from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from psgd_workers.data.examples import Features
from psgd_workers.data.features import check_finite, row_features
from psgd_workers.data.raw import RawArray
from psgd_workers.errors import DataError


def features_of(values: NDArray[Any]) -> Features:
    return row_features(RawArray("x", values))


@pytest.mark.parametrize("dtype", [np.bool_, np.int8, np.int64, np.float16, ">f8", np.longdouble])
def test_numbers_of_any_dtype_become_native_float32(dtype: Any) -> None:
    features = features_of(np.array([[1, 0], [0, 1]]).astype(dtype))
    np.testing.assert_array_equal(features, np.array([[1, 0], [0, 1]], np.float32), strict=True)


def test_bytes_stay_bytes() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    for given_values in (pixels, pixels.T):
        features = features_of(given_values)
        np.testing.assert_array_equal(features, given_values, strict=True)
        assert features.flags.c_contiguous


@given(hnp.arrays(np.int16, hnp.array_shapes(min_dims=2, max_dims=4)))
def test_features_keep_their_shape_and_are_contiguous(values: NDArray[np.int16]) -> None:
    for given_values in (values, values.T):
        features = features_of(given_values)
        np.testing.assert_array_equal(features, given_values)
        assert features.flags.c_contiguous


def test_one_number_per_example_becomes_one_column() -> None:
    assert features_of(np.arange(3)).shape == (3, 1)


@pytest.mark.parametrize("values", [np.ones(2, np.complex64), np.array(["a"]), np.array([{}]), np.array([b"a"])])
def test_what_is_no_real_number_is_refused(values: NDArray[Any]) -> None:
    with pytest.raises(DataError, match=re.escape(f"x has dtype {values.dtype}; expected integers, floats or bools")):
        features_of(values)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0)])
def test_nothing_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=re.escape(f"x has shape {shape}; expected [examples, ...]")):
        features_of(np.zeros(shape))


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf, 1e300])
def test_the_first_value_that_float32_does_not_hold_is_named(odd: float) -> None:
    values = np.zeros((4, 5))
    values[2, 3] = values[3, 0] = odd
    with pytest.raises(DataError, match=r"x: row 2, column 3 \(from 0\) is (nan|-?inf) in float32"):
        features_of(values)


def test_a_column_of_an_image_is_its_place_in_the_example() -> None:
    images = np.zeros((2, 3, 4), np.float32)
    images[1, 2, 0] = np.nan
    with pytest.raises(DataError, match=r"pixels: row 1, column \(2, 0\) \(from 0\) is nan"):
        check_finite("pixels", images)
