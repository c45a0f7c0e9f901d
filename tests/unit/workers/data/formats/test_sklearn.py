from __future__ import annotations

import sys

import numpy as np
import pytest
from sklearn import datasets

from psgd_workers.data.formats.sklearn import read_sklearn
from psgd_workers.errors import MissingExtraError
from psgd_workers.spec import SklearnData


@pytest.mark.parametrize(
    ("spec", "classes"),
    [
        (SklearnData(format="sklearn", dataset="breast_cancer"), ("malignant", "benign")),
        (SklearnData(format="sklearn", dataset="diabetes"), None),
        (SklearnData(format="sklearn", dataset="digits"), tuple("0123456789")),
        (SklearnData(format="sklearn", dataset="iris"), ("setosa", "versicolor", "virginica")),
        (SklearnData(format="sklearn", dataset="wine"), ("class_0", "class_1", "class_2")),
    ],
    ids=lambda value: value.dataset if isinstance(value, SklearnData) else "",
)
def test_a_bundled_set_comes_with_the_names_of_its_classes(spec: SklearnData, classes: tuple[str, ...] | None) -> None:
    raw = read_sklearn(spec)
    assert raw.classes == classes
    features, labels = getattr(datasets, f"load_{spec.dataset}")(return_X_y=True)
    (part,) = raw.parts
    np.testing.assert_array_equal(part.features.values, features)
    np.testing.assert_array_equal(part.labels.values, labels)


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingExtraError, match=r"'iris' is part of scikit-learn.*pip install 'psgd\[data\]'"):
        read_sklearn(SklearnData(format="sklearn", dataset="iris"))
