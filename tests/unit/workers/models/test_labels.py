from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

from psgd_workers.data.examples import Dataset, Examples
from psgd_workers.errors import DataError
from psgd_workers.models.labels import fit_labels, num_outputs
from psgd_workers.spec import LinearModel, LossName, PythonModel

INTEGERS = np.int64
NUMBERS = np.float32


def examples(labels: ArrayLike, dtype: type) -> Examples:
    array: NDArray[Any] = np.array(labels, dtype)
    return Examples(np.zeros((len(array), 2), np.float32), array)


def dataset(
    labels: ArrayLike, dtype: type, classes: tuple[str, ...] | None = None, validation: ArrayLike | None = None
) -> Dataset:
    held_out = None if validation is None else examples(validation, dtype)
    return Dataset(examples(labels, dtype), held_out, classes, fingerprint="")


def linear(loss: LossName) -> LinearModel:
    return LinearModel(kind="linear", loss=loss)


@pytest.mark.parametrize(
    ("loss", "given", "expected", "dtype", "outputs"),
    [
        ("cross_entropy", dataset([0, 2, 1], INTEGERS, ("a", "b", "c")), [0, 2, 1], INTEGERS, 3),
        ("cross_entropy", dataset([0, 1, 0], np.uint8, ("a", "b", "c")), [0, 1, 0], INTEGERS, 3),
        ("binary_cross_entropy", dataset([0, 1, 1], INTEGERS, ("-1", "+1")), [0, 1, 1], INTEGERS, 1),
        ("binary_cross_entropy", dataset([0, 0], INTEGERS, ("no", "yes")), [0, 0], INTEGERS, 1),
        ("binary_cross_entropy", dataset([[0.0], [1.0]], NUMBERS), [0, 1], INTEGERS, 1),
        ("mse", dataset([0.5, 1.5], np.float64), [[0.5], [1.5]], NUMBERS, 1),
        ("mse", dataset([[0.5, 1.0], [2.0, 3.0]], NUMBERS), [[0.5, 1], [2, 3]], NUMBERS, 2),
        ("mse", dataset([3, -7], INTEGERS), [[3], [-7]], NUMBERS, 1),
        ("mse", dataset([1, 0, 1], INTEGERS, ("25", "310.5")), [[310.5], [25], [310.5]], NUMBERS, 1),
    ],
)
def test_labels_take_the_form_of_the_loss(
    loss: LossName, given: Dataset, expected: list[Any], dtype: type, outputs: int
) -> None:
    fitted = fit_labels(linear(loss), given)
    assert fitted.train.labels.dtype == dtype
    np.testing.assert_array_equal(fitted.train.labels, expected)
    assert fitted.train.features is given.train.features
    assert num_outputs(loss, fitted) == outputs
    np.testing.assert_array_equal(fit_labels(linear(loss), fitted).train.labels, expected)


@pytest.mark.parametrize(
    ("loss", "given", "message"),
    [
        (
            "cross_entropy",
            dataset([[0.5], [1.0]], NUMBERS),
            r"they are numbers \(float32 \[2, 1\]\), not classes.*'mse'",
        ),
        ("cross_entropy", dataset([0, 3], INTEGERS, ("a", "b")), "run from 0 to 3, but there are 2 classes"),
        ("cross_entropy", dataset([0, -1], INTEGERS, ("a", "b")), "run from -1 to 0, but there are 2 classes"),
        ("cross_entropy", dataset([[0], [1]], INTEGERS, ("a", "b")), r"int64 \[2, 1\]; expected one integer"),
        ("cross_entropy", dataset([0.0, 1.0], NUMBERS, ("a", "b")), r"float32 \[2\]; expected one integer"),
        ("binary_cross_entropy", dataset([0, 1, 2], INTEGERS, ("a", "b", "c")), "found 3 classes.*'cross_entropy'"),
        ("binary_cross_entropy", dataset([0, 0.5], NUMBERS), "nothing but 0 and 1, found numbers from 0.0 to 0.5"),
        ("binary_cross_entropy", dataset([0, np.nan], NUMBERS), "nothing but 0 and 1"),
        ("binary_cross_entropy", dataset([[0, 1], [1, 0]], INTEGERS), r"shape is \[2, 2\]; expected one label"),
        ("mse", dataset([0, 1], INTEGERS, ("setosa", "virginica")), "named setosa, virginica, not numbers"),
        ("mse", dataset(["1", "x"], np.str_), "expected numbers"),
        ("mse", dataset([[[1.0]]], NUMBERS), r"float32 \[1, 1, 1\]; expected numbers"),
        ("mse", dataset([1.0, np.inf], NUMBERS), "expected finite numbers"),
    ],
)
def test_labels_that_do_not_fit_are_refused(loss: LossName, given: Dataset, message: str) -> None:
    with pytest.raises(DataError, match=f"the training labels do not fit loss '{loss}': .*{message}"):
        fit_labels(linear(loss), given)


def test_validation_labels_are_fitted_and_checked_too() -> None:
    fitted = fit_labels(linear("mse"), dataset([1.0], NUMBERS, validation=[2.0, 3.0]))
    assert fitted.validation is not None
    np.testing.assert_array_equal(fitted.validation.labels, [[2], [3]])
    with pytest.raises(DataError, match="the validation labels do not fit loss 'cross_entropy'"):
        fit_labels(linear("cross_entropy"), dataset([0, 1], INTEGERS, ("a", "b"), validation=[2]))


def test_a_regression_has_no_classes() -> None:
    assert fit_labels(linear("mse"), dataset([0, 1], INTEGERS, ("1", "2"))).classes is None


def test_a_model_of_the_users_own_gets_its_labels_as_they_are() -> None:
    given = dataset([["anything"]], np.str_)
    assert fit_labels(PythonModel(kind="python", path="a:b"), given) is given
