from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from psgd_workers.data.labels import MAX_CLASSES, check_two_classes, encode_labels
from psgd_workers.data.raw import RawArray
from psgd_workers.errors import DataError
from psgd_workers.spec import LossName

CROSS: LossName = "cross_entropy"
BINARY: LossName = "binary_cross_entropy"
MSE: LossName = "mse"
OWN: LossName | None = None
CLASSIFIERS: tuple[LossName | None, ...] = (CROSS, BINARY, OWN)
LOSSES: tuple[LossName | None, ...] = (*CLASSIFIERS, MSE)

each_loss = pytest.mark.parametrize("loss", LOSSES)
each_classifier = pytest.mark.parametrize("loss", CLASSIFIERS)


def encode(
    train: Any, validation: Any = None, loss: LossName | None = None, names: tuple[str, ...] | None = None
) -> tuple[list[NDArray[Any]], tuple[str, ...] | None]:
    parts = [RawArray("y", np.asarray(train))]
    if validation is not None:
        parts.append(RawArray("y_val", np.asarray(validation)))
    return encode_labels(parts, loss, names)


# Classes


@each_classifier
@pytest.mark.parametrize("dtype", [np.bool_, np.int8, np.uint8, np.uint64, ">i4"])
def test_integers_of_any_dtype_are_classes(dtype: Any, loss: LossName | None) -> None:
    (labels,), classes = encode(np.array([1, 0, 1]).astype(dtype), loss=loss)
    np.testing.assert_array_equal(labels, np.array([1, 0, 1], np.int64), strict=True)
    assert classes == ("0", "1")


@pytest.mark.parametrize("loss", [CROSS, BINARY])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_two_whole_numbers_stored_as_floats_are_classes_of_a_classifier(dtype: Any, loss: LossName) -> None:
    (train, validation), classes = encode(np.array([1, 0, 1], dtype), np.array([0, 1]), loss)
    np.testing.assert_array_equal(train, np.array([1, 0, 1], np.int64), strict=True)
    np.testing.assert_array_equal(validation, np.array([0, 1], np.int64), strict=True)
    assert classes == ("0", "1")


@pytest.mark.parametrize("loss", [CROSS, OWN])
def test_classes_count_up_to_the_largest_training_label(loss: LossName | None) -> None:
    labels, classes = encode([0, 3], [2, 1, 1], loss)
    assert classes == ("0", "1", "2", "3")
    assert [part.tolist() for part in labels] == [[0, 3], [2, 1, 1]]


@pytest.mark.parametrize("loss", [CROSS, BINARY])
@pytest.mark.parametrize(("low", "high"), [(-1, 1), (-1.0, 1.0), (-7, MAX_CLASSES), (0, 2**53), ("no", "yes")])
def test_two_different_values_are_the_two_classes(low: Any, high: Any, loss: LossName) -> None:
    (train, validation), classes = encode([high, low, low], [low, high], loss)
    assert (train.tolist(), validation.tolist()) == ([1, 0, 0], [0, 1])
    assert classes == tuple(str(label).removesuffix(".0") for label in (low, high))


def test_a_binary_loss_takes_any_two_numbers_and_one_over_all_classes_counts_from_0() -> None:
    assert encode([1, 2], loss=BINARY)[1] == ("1", "2")
    assert encode([1, 2], loss=CROSS)[1] == ("0", "1", "2")


@each_classifier
def test_one_column_of_classes_is_squeezed(loss: LossName | None) -> None:
    (labels,), _ = encode([[1], [0]], loss=loss)
    np.testing.assert_array_equal(labels, [1, 0], strict=True)


@pytest.mark.parametrize("loss", [CROSS, OWN])
def test_names_of_the_format_are_kept(loss: LossName | None) -> None:
    assert encode([0, 1], loss=loss, names=("no", "yes", "maybe"))[1] == ("no", "yes", "maybe")


@given(st.lists(st.text("abcé ", min_size=1), min_size=1), st.data(), st.sampled_from((CROSS, OWN)))
def test_text_becomes_classes_in_sorted_order(words: list[str], data: st.DataObject, loss: LossName | None) -> None:
    validation = data.draw(st.lists(st.sampled_from(words), min_size=1))
    labels, classes = encode(words, validation, loss)
    assert classes == tuple(sorted(set(words)))
    assert [[classes[code] for code in part] for part in labels] == [words, validation]
    assert all(part.dtype == np.int64 for part in labels)


# Targets


@pytest.mark.parametrize("loss", [MSE, OWN])
def test_floats_are_targets(loss: LossName | None) -> None:
    (train, validation), classes = encode(np.array([1.5, 2.0]), np.array([0.5], np.float16), loss)
    np.testing.assert_array_equal(train, np.array([[1.5], [2.0]], np.float32), strict=True)
    np.testing.assert_array_equal(validation, np.array([[0.5]], np.float32), strict=True)
    assert classes is None


@given(st.lists(st.integers(-(2**24), 2**24), min_size=1), st.lists(st.integers(-(2**24), 2**24), min_size=1))
def test_whole_numbers_of_any_size_are_targets_of_a_regression(train: list[int], validation: list[int]) -> None:
    labels, classes = encode(train, validation, MSE)
    for part, expected in zip(labels, (train, validation), strict=True):
        np.testing.assert_array_equal(part, np.array(expected, np.float32)[:, np.newaxis], strict=True)
    assert classes is None


def test_a_regression_takes_integers_beside_floats_and_bools() -> None:
    assert [part.tolist() for part in encode([1, 2], [0.5], MSE)[0]] == [[[1], [2]], [[0.5]]]
    assert [part.tolist() for part in encode([True, False], loss=MSE)[0]] == [[[1], [0]]]


def test_names_that_are_the_numbers_themselves_are_no_obstacle_to_a_regression() -> None:
    assert encode([0, 1], loss=MSE, names=("0", "1"))[0][0].tolist() == [[0], [1]]


@pytest.mark.parametrize(("loss", "dtype"), [(MSE, np.int64), (MSE, np.float64), (OWN, np.float64)])
def test_several_targets_are_kept(loss: LossName | None, dtype: Any) -> None:
    (labels,), _ = encode(np.arange(6).reshape(3, 2).astype(dtype), loss=loss)
    np.testing.assert_array_equal(labels, np.arange(6, dtype=np.float32).reshape(3, 2), strict=True)


# Refusals

NOT_NUMBERED = (
    f"expected classes numbered from 0 to at most {MAX_CLASSES - 1}, or two different values: number the classes from "
    "0, or write them as text; for a regression use `loss: mse`"
)


@pytest.mark.parametrize(
    ("loss", "train", "validation", "message"),
    [
        (CROSS, [0, 1, -1], None, f"y: row 2 (from 0) has label -1; {NOT_NUMBERED}"),
        (CROSS, [0, 1, MAX_CLASSES], None, f"y: row 2 (from 0) has label {MAX_CLASSES}; {NOT_NUMBERED}"),
        (
            CROSS,
            np.array([0, 1, 2**64 - 1], np.uint64),
            None,
            f"y: row 2 (from 0) has label {2**64 - 1}; {NOT_NUMBERED}",
        ),
        (CROSS, [0, 0.5], None, "y: row 1 (from 0) has label 0.5; loss 'cross_entropy' expects classes, which are"),
        (
            CROSS,
            [0.0, 1.0, 2.0],
            None,
            "y has 3 different floats (0.0, 1.0, 2.0); loss 'cross_entropy' expects classes: store",
        ),
        (CROSS, [0, np.nan], None, "y: row 1 (from 0) has label nan; loss 'cross_entropy' expects classes"),
        (CROSS, [0, np.inf], None, "y: row 1 (from 0) has label inf"),
        (
            CROSS,
            [0, 1],
            [1, 0, 2],
            "y_val: row 2 (from 0) has label 2, which is not among the training classes (0, 1): ",
        ),
        (CROSS, [0, 1], [-1], "y_val: row 0 (from 0) has label -1, which is not among the training classes (0, 1)"),
        (CROSS, [-1, 1], [0], "y_val: row 0 (from 0) has label 0, which is not among the training classes (-1, 1)"),
        (
            CROSS,
            ["a", "b"],
            ["b", "c"],
            "y_val: row 1 (from 0) has label 'c', which is not among the training classes (a",
        ),
        (CROSS, range(9), [9], "not among the training classes (0, 1, ..., 8): correct the label, drop the row"),
        (CROSS, [[0, 1]], None, "y has dtype int64 and shape (1, 2); expected one class per example"),
        (CROSS, [0, 1], ["0"], "y_val holds text, but y holds integers; give both the same dtype"),
        (
            BINARY,
            [0, 1, 2],
            None,
            "y has 3 different labels (0, 1, 2); loss 'binary_cross_entropy' expects two: use `loss: c",
        ),
        (BINARY, [-1, 0, 1], None, "y has 3 different labels (-1, 0, 1); loss 'binary_cross_entropy' expects two"),
        (BINARY, ["a", "b", "c"], None, "y has 3 different labels (a, b, c); loss 'binary_cross_entropy' expects two"),
        (BINARY, [0, 0.5], None, "y: row 1 (from 0) has label 0.5; loss 'binary_cross_entropy' expects classes"),
        (BINARY, [[0, 1], [1, 0]], None, "y has dtype int64 and shape (2, 2); expected one class per example"),
        (
            MSE,
            ["cat", "dog"],
            None,
            "y holds classes named cat, dog; loss 'mse' expects numbers: use `loss: cross_entropy`",
        ),
        (MSE, [1.0, np.nan], None, "y: row 1, column 0 (from 0) is nan in float32"),
        (MSE, np.zeros((2, 2)), np.zeros((2, 3)), "y_val has 3 targets per example, but y has 2; give both"),
        (OWN, [0, -1], None, "y: row 1 (from 0) has label -1; expected classes numbered from 0"),
        (OWN, [-1, 1], None, "for a regression store the labels as floats (in a CSV file: 3.0 instead of 3)"),
        (OWN, [MAX_CLASSES], None, f"y: row 0 (from 0) has label {MAX_CLASSES}; expected classes numbered from 0"),
        (OWN, [0, 1], [0.0], "y_val holds floats, but y holds integers; give both the same dtype"),
        (OWN, [1.0, 1e300], None, "y: row 1, column 0 (from 0) is inf in float32"),
        (OWN, np.zeros((2, 2, 2)), None, "y has shape (2, 2, 2); expected [examples] or [examples, targets]"),
        (OWN, np.zeros((2, 0)), None, "y has shape (2, 0)"),
    ],
)
def test_labels_that_do_not_fit_are_refused_and_what_to_write_is_told(
    loss: LossName | None, train: Any, validation: Any, message: str
) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        encode(train, validation, loss)


@each_loss
@pytest.mark.parametrize("train", [[1j], [None], [b"a"]])
def test_what_is_neither_number_nor_text_is_refused(train: Any, loss: LossName | None) -> None:
    with pytest.raises(DataError, match=r"y has dtype .*; expected integers, floats, bools or text"):
        encode(train, loss=loss)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            BINARY,
            r"y has 3 different labels \(setosa, versicolor, virginica\); loss 'binary_cross_entropy' expects two",
        ),
        (MSE, "y holds classes named setosa, versicolor, virginica; loss 'mse' expects numbers"),
    ],
)
def test_three_names_are_no_binary_classes_and_words_are_no_targets(loss: LossName, message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode([0, 1], loss=loss, names=("setosa", "versicolor", "virginica"))


@pytest.mark.parametrize("loss", [CROSS, BINARY])
@pytest.mark.parametrize(("label", "name"), [(0, "0"), (1, "1"), (-1, "-1"), (3.0, "3"), ("yes", "yes")])
def test_a_classifier_is_not_trained_on_one_class(label: Any, name: str, loss: LossName) -> None:
    (labels,), classes = encode([label] * 3, loss=loss)
    with pytest.raises(DataError, match=f"y: all 3 training labels are '{name}', but loss '{loss}' needs"):
        check_two_classes("y", labels, classes, loss)


@each_loss
def test_two_classes_and_targets_that_are_all_alike_are_trained_on(loss: LossName | None) -> None:
    for train in ([0, 1, 1], [1.0, 1.0]) if loss in (MSE, OWN) else ([0, 1, 1],):
        (labels,), classes = encode(train, loss=loss)
        check_two_classes("y", labels, classes, loss)
