from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from psgd_workers.data.labels import MAX_CLASSES, encode_labels
from psgd_workers.data.raw import RawArray
from psgd_workers.errors import DataError


def encode(train: Any, validation: Any = None) -> tuple[list[NDArray[Any]], tuple[str, ...] | None]:
    parts = [RawArray("y", np.asarray(train))]
    if validation is not None:
        parts.append(RawArray("y_val", np.asarray(validation)))
    return encode_labels(parts)


@pytest.mark.parametrize("dtype", [np.bool_, np.int8, np.uint8, np.uint64, ">i4"])
def test_integers_of_any_dtype_are_classes(dtype: Any) -> None:
    (labels,), classes = encode(np.array([1, 0, 1]).astype(dtype))
    np.testing.assert_array_equal(labels, np.array([1, 0, 1], np.int64), strict=True)
    assert classes == ("0", "1")


def test_classes_count_up_to_the_largest_training_label() -> None:
    labels, classes = encode([0, 3], [2, 1, 1])
    assert classes == ("0", "1", "2", "3")
    assert [part.tolist() for part in labels] == [[0, 3], [2, 1, 1]]


def test_one_column_of_classes_is_squeezed() -> None:
    (labels,), _ = encode([[1], [0]])
    np.testing.assert_array_equal(labels, [1, 0], strict=True)


def test_names_of_the_format_are_kept() -> None:
    _, classes = encode_labels([RawArray("y", np.array([0, 1]))], ("no", "yes", "maybe"))
    assert classes == ("no", "yes", "maybe")


@given(st.lists(st.text("abcé ", min_size=1), min_size=1), st.data())
def test_text_becomes_classes_in_sorted_order(words: list[str], data: st.DataObject) -> None:
    validation = data.draw(st.lists(st.sampled_from(words), min_size=1))
    labels, classes = encode(words, validation)
    assert classes == tuple(sorted(set(words)))
    assert [[classes[code] for code in part] for part in labels] == [words, validation]
    assert all(part.dtype == np.int64 for part in labels)


def test_floats_are_targets() -> None:
    (train, validation), classes = encode(np.array([1.5, 2.0]), np.array([0.5], np.float16))
    np.testing.assert_array_equal(train, np.array([[1.5], [2.0]], np.float32), strict=True)
    np.testing.assert_array_equal(validation, np.array([[0.5]], np.float32), strict=True)
    assert classes is None


def test_several_targets_are_kept() -> None:
    (labels,), _ = encode(np.arange(6.0).reshape(3, 2))
    assert labels.shape == (3, 2)


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        ([0, -1], None, "y: row 1 (from 0) has label -1; expected the training classes, 0 to 0"),
        ([-3], None, "y: row 0 (from 0) has label -3"),
        ([0, 1], [1, 0, 2], "y_val: row 2 (from 0) has label 2; expected the training classes, 0 to 1"),
        ([0, 1], [-1], "y_val: row 0 (from 0) has label -1"),
        (["a", "b"], ["b", "c"], "y_val: row 1 (from 0) has label 'c', which no training example has"),
        ([MAX_CLASSES], None, f"y: label {MAX_CLASSES} is beyond the {MAX_CLASSES} classes allowed"),
        (np.array([2**64 - 1], np.uint64), None, f"y: label {2**64 - 1} is beyond"),
        ([[0, 1]], None, "y has dtype int64 and shape (1, 2); expected one class per example"),
        ([0, 1], [0.0], "y_val holds floats, but y integers; give both the same dtype"),
        ([1.0, np.nan], None, "y: row 1, column 0 (from 0) is nan in float32"),
        ([1.0, 1e300], None, "y: row 1, column 0 (from 0) is inf in float32"),
        (np.zeros((2, 2, 2)), None, "y has shape (2, 2, 2); expected [examples] or [examples, targets]"),
        (np.zeros((2, 0)), None, "y has shape (2, 0)"),
        (np.zeros((2, 2)), np.zeros((2, 3)), "y_val has 3 targets, but y 2"),
        ([1j], None, "y has dtype complex128; expected integers, floats, bools or text"),
        ([None], None, "y has dtype object"),
    ],
)
def test_labels_that_cannot_be_learnt_are_refused(train: Any, validation: Any, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        encode(train, validation)
