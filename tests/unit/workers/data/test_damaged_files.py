"""Damaged copies of data files, drawn by a seed: each is refused, or read without a changed value."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from psgd_workers.data import open_dataset
from psgd_workers.spec import CsvData, NpzData
from tests.support.fuzzing import check_reader
from tests.support.mutations import mutations

each_number = pytest.mark.parametrize(
    "number", [300, pytest.param(10_000, marks=[pytest.mark.chaos, pytest.mark.timeout(1_200)])]
)


def archive(compressed: bool) -> bytes:
    content = io.BytesIO()
    save = np.savez_compressed if compressed else np.savez
    features = np.arange(40, dtype=np.uint8).reshape(20, 2)
    labels = np.array(["cat", "dog"])[np.arange(20) % 2]
    save(content, x_train=features, y_train=labels, x_test=features[:4].astype(np.float64), y_test=labels[:4])
    return content.getvalue()


@each_number
@pytest.mark.parametrize("compressed", [False, True], ids=["stored", "compressed"])
def test_a_damaged_archive_is_refused_or_has_all_values(tmp_path: Path, compressed: bool, number: int) -> None:
    path = tmp_path / "data.npz"
    spec = NpzData(format="npz", path=str(path))
    original = archive(compressed)
    path.write_bytes(original)
    known = open_dataset(spec, 0, "cross_entropy").fingerprint

    def read(content: bytes) -> None:
        path.write_bytes(content)
        assert open_dataset(spec, 0, "cross_entropy").fingerprint == known

    num_read, num_refused = check_reader(read, mutations(original, number, seed=1))
    assert num_read + num_refused == number
    assert num_refused > number / 2


TABLES = {
    "numbers": "a,b,c\n" + "".join(f"{i},{i * 0.37:.3f},{i % 3}\n" for i in range(40)),
    "names": 'a,"b, c",kind\n' + "".join(f'{i},-{i}e-3,"ca""t {i % 2}"\r\n' for i in range(40)),
    "no header": "".join(f"{i};{i + 1};{i % 2}.5\n" for i in range(40)),
}


@each_number
@pytest.mark.parametrize("name", TABLES)
def test_a_damaged_table_is_refused_or_has_finite_numbers(tmp_path: Path, name: str, number: int) -> None:
    path = tmp_path / "table.csv"
    spec = CsvData(
        format="csv", path=str(path), header=name != "no header", delimiter=";" if ";" in TABLES[name] else ","
    )

    def read(content: bytes) -> None:
        path.write_bytes(content)
        train = open_dataset(spec, 0).train
        assert len(train.features) == len(train.labels) > 0
        assert np.isfinite(train.features).all()

    num_read, num_refused = check_reader(read, mutations(TABLES[name].encode(), number, seed=2))
    assert num_read + num_refused == number
    assert num_refused > 0
