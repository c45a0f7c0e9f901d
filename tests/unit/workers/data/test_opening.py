from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from psgd_workers.data import Dataset, Examples, open_dataset
from psgd_workers.data.split import split_validation
from psgd_workers.errors import DataError
from psgd_workers.spec import CsvData, DataSpec, LossName, NpzData, SklearnData


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data.npz"


def open_arrays(path: Path, seed: int = 0, *, fields: dict[str, Any] | None = None, **arrays: Any) -> Dataset:
    np.savez(path, **arrays)
    return open_dataset(NpzData(format="npz", path=str(path), **(fields or {})), seed)


def test_mnist_is_opened_in_the_unit_range(mnist: Dataset) -> None:
    assert mnist.validation is not None
    assert mnist.train.features.shape == (60000, 28, 28)
    assert mnist.validation.features.shape == (10000, 28, 28)
    assert mnist.train.features.dtype == np.uint8
    assert mnist.train.labels.dtype == np.int64
    for part in (mnist.train, mnist.validation):
        inputs = part.inputs(slice(None))
        assert inputs.dtype == np.float32
        assert (inputs.min(), inputs.max()) == (0, 1)
    assert mnist.classes == tuple("0123456789")
    assert mnist.train.labels[:5].tolist() == [5, 0, 4, 1, 9]


def test_a_table_of_text_labels_is_opened(tmp_path: Path) -> None:
    (tmp_path / "pets.csv").write_text("weight,kind\n30,dog\n4,cat\n5,cat\n")
    dataset = open_dataset(CsvData(format="csv", path=str(tmp_path / "pets.csv")), 0)
    assert dataset.classes == ("cat", "dog")
    assert dataset.validation is None
    np.testing.assert_array_equal(dataset.train.features, np.array([[30], [4], [5]], np.float32), strict=True)
    np.testing.assert_array_equal(dataset.train.labels, np.array([1, 0, 0]), strict=True)


def test_a_regression_is_opened() -> None:
    dataset = open_dataset(SklearnData(format="sklearn", dataset="diabetes", validation_fraction=0.25), 0)
    assert dataset.validation is not None
    assert (len(dataset.train), len(dataset.validation)) == (332, 110)
    assert dataset.train.labels.shape == (332, 1)
    assert dataset.train.labels.dtype == np.float32
    assert dataset.classes is None


def test_the_classes_do_not_depend_on_the_split(path: Path) -> None:
    arrays = {"x_train": np.arange(10), "y_train": np.arange(10)}
    for seed in range(10):
        dataset = open_arrays(path, seed, fields={"validation_fraction": 0.5}, **arrays)
        assert dataset.classes == tuple("0123456789")


def test_normalisation_looks_at_the_training_part_only(path: Path) -> None:
    dataset = open_arrays(
        path,
        fields={"normalize": "unit"},
        x_train=[[0, 2], [4, 1]],
        y_train=[0, 1],
        x_test=[[8, -4]],
        y_test=[0],
    )
    assert dataset.validation is not None
    assert dataset.train.features.tolist() == [[0, 0.5], [1, 0.25]]
    assert dataset.validation.features.tolist() == [[2, -1]]


def test_the_same_data_has_the_same_fingerprint(path: Path) -> None:
    features: NDArray[Any] = np.arange(12).reshape(6, 2)
    labels = np.array([0, 1, 0, 1, 0, 1])
    known = open_arrays(path, x_train=features, y_train=labels).fingerprint
    assert re.fullmatch("[0-9a-f]{64}", known)
    assert open_arrays(path, seed=1, x_train=features.astype(np.int16), y_train=labels).fingerprint == known
    with_validation: dict[str, Any] = {"x_train": features, "y_train": labels, "x_test": features, "y_test": labels}
    others = [
        open_arrays(path, **with_validation),
        open_arrays(path, **with_validation | {"x_test": features + 1}),
        open_arrays(path, **with_validation | {"y_test": 1 - labels}),
        open_arrays(path, **with_validation | {"x_test": features[:-1], "y_test": labels[:-1]}),
        open_arrays(path, x_train=features, y_train=np.array(["a", "b"])[labels]),
        open_arrays(path, x_train=features, y_train=np.array(["b", "c"])[labels]),
        open_arrays(path, x_train=features[::-1], y_train=labels),
        open_arrays(path, x_train=features, y_train=1 - labels),
        open_arrays(path, x_train=features.reshape(6, 2, 1), y_train=labels),
        open_arrays(path, x_train=features, y_train=labels.astype(np.float32)),
        open_arrays(path, x_train=features, y_train=labels, fields={"normalize": "unit"}),
        *(open_arrays(path, s, x_train=features, y_train=labels, fields={"validation_fraction": 0.3}) for s in (1, 2)),
    ]
    assert len({known, *(other.fingerprint for other in others)}) == 14


def test_the_same_content_has_the_same_fingerprint_wherever_it_lies(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.csv").write_text("weight,kind\n30,dog\n4,cat\n5,cat\n")
    np.savez(tmp_path / "c.npz", x_train=[[30], [4], [5]], y_train=["dog", "cat", "cat"])
    specs: list[DataSpec] = [NpzData(format="npz", path=str(tmp_path / "c.npz"))]
    specs += [CsvData(format="csv", path=str(tmp_path / name / f"{name}.csv")) for name in ("a", "b")]
    assert len({open_dataset(spec, 0).fingerprint for spec in specs}) == 1


@pytest.mark.parametrize(("loss", "expected"), [("mse", [[25], [-310], [25]]), ("cross_entropy", [1, 0, 1])])
def test_the_loss_decides_what_the_labels_mean(tmp_path: Path, loss: LossName, expected: list[Any]) -> None:
    (tmp_path / "table.csv").write_text("x,y\n1,25\n2,-310\n3,25\n")
    dataset = open_dataset(CsvData(format="csv", path=str(tmp_path / "table.csv")), 0, loss)
    assert dataset.train.labels.tolist() == expected
    assert dataset.classes == (None if loss == "mse" else ("-310", "25"))


def test_a_regression_may_be_validated_on_larger_numbers_than_it_is_trained_on(path: Path) -> None:
    arrays: dict[str, Any] = {"x_train": [[1], [2]], "y_train": [3, 4], "x_test": [[3]], "y_test": [2**21]}
    np.savez(path, **arrays)
    validation = open_dataset(NpzData(format="npz", path=str(path)), 0, "mse").validation
    assert validation is not None
    assert validation.labels.tolist() == [[2**21]]


@pytest.mark.parametrize("fields", [{}, {"validation_fraction": 0.01}])
def test_a_classifier_needs_two_classes_in_its_training_part(path: Path, fields: dict[str, Any]) -> None:
    labels = np.ones(100, np.int64)
    if fields:  # the split moves the only example of the other class to the validation part
        drawn = split_validation(Examples(np.zeros((100, 1), np.float32), np.arange(100)), 0.01, 0)[1].labels
        labels[drawn] = 0
    np.savez(path, x_train=np.arange(100), y_train=labels, x_test=np.arange(2), y_test=np.arange(2))
    with pytest.raises(
        DataError, match=r"y_train: all (99|100) training labels are '1', but loss 'cross_entropy' needs"
    ):
        open_dataset(NpzData(format="npz", path=str(path), **fields), 0, "cross_entropy")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"x_train": [[1], [2]], "y_train": [0]},
            "x_train has shape (2, 1), but {path}: y_train has shape (1,); expected one label",
        ),
        ({"x_train": [1], "y_train": 0}, "x_train has shape (1,), but {path}: y_train has shape ()"),
        ({"x_train": 1, "y_train": 0}, "x_train has shape (); expected [examples, ...]"),
        ({"x_train": [], "y_train": []}, "x_train has shape (0,); expected [examples, ...] with at least one example"),
        (
            {"x_train": [[1, 2]], "y_train": [0], "x_test": [[1]], "y_test": [0]},
            "x_test has examples of shape (1,), but {path}: x_train has examples of shape (2,); give",
        ),
        (
            {"x_train": [[1]], "y_train": [0], "x_test": [[1], [2]], "y_test": [0]},
            "x_test has shape (2, 1), but {path}: y_test has shape (1,)",
        ),
        ({"x_train": [[1]], "y_train": [0], "x_test": [[1]], "y_test": [4]}, "y_test: row 0 (from 0) has label 4"),
        ({"x_train": [[1], [np.nan]], "y_train": [0, 1]}, "x_train: row 1, column 0 (from 0) is nan"),
        ({"x_train": [[1]], "y_train": [np.inf]}, "y_train: row 0, column 0 (from 0) is inf"),
        ({"x_train": ["a"], "y_train": [0]}, "x_train has dtype <U1"),
    ],
)
def test_data_that_cannot_be_learnt_from_is_refused(path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(f"{path}: {message.format(path=path)}")):
        open_arrays(path, **arrays)


def test_one_example_cannot_be_split(path: Path) -> None:
    with pytest.raises(DataError, match="drop validation_fraction"):
        open_arrays(path, x_train=[[1]], y_train=[0], fields={"validation_fraction": 0.5})


@pytest.mark.parametrize(
    ("name", "content"), [("a.npz", b"PK\x03\x04"), ("a.csv", b"1,q\n2,q\0\n"), ("b.csv", b"x,y\n1_0,0\n")]
)
def test_hostile_data_ends_a_command_with_2_and_one_sentence(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    header = "" if name == "a.npz" else ", header: true"
    (tmp_path / "job.yaml").write_text(
        f"model: {{kind: linear, loss: mse}}\ndata: {{format: {name[2:]}, path: {name}{header}}}\n"
        "optimizer: {lr: 0.1}\nrun: {epochs: 1}\n"
    )
    command = [sys.executable, "-m", "psgd.cli", "simulate", "job.yaml"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"psgd: {name}")
    assert ended.stderr.count("\n") == 1
