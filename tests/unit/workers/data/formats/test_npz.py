from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from psgd_workers.data.formats.npz import read_npz
from psgd_workers.data.raw import RawData
from psgd_workers.errors import DataError
from psgd_workers.spec import NpzData

KERAS: dict[str, Any] = {
    "x_train": np.arange(6).reshape(3, 2),
    "y_train": np.array([0, 1, 0]),
    "x_test": np.array([[8, 9]]),
    "y_test": np.array([1]),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "data.npz"
    np.savez(path, **KERAS)
    return path


def read(path: Path | str, **fields: Any) -> RawData:
    return read_npz(NpzData(format="npz", path=str(path), **fields))


def names(raw: RawData) -> list[tuple[str, str]]:
    return [(part.features.name.split(": ")[1], part.labels.name.split(": ")[1]) for part in raw.parts]


def test_kerass_keys_need_no_naming(path: Path) -> None:
    raw = read(path)
    assert names(raw) == [("x_train", "y_train"), ("x_test", "y_test")]
    for part in raw.parts:
        for array in (part.features, part.labels):
            np.testing.assert_array_equal(array.values, KERAS[array.name.removeprefix(f"{path}: ")], strict=True)


def test_a_validation_fraction_leaves_the_test_part_alone(path: Path) -> None:
    assert names(read(path, validation_fraction=0.5)) == [("x_train", "y_train")]


def test_a_file_may_hold_features_and_labels_alone(tmp_path: Path) -> None:
    np.savez(tmp_path / "xy.npz", x=np.zeros((2, 2)), y=np.zeros(2))
    assert names(read(tmp_path / "xy.npz", features="x", labels="y")) == [("x", "y")]


def test_named_validation_keys_come_before_kerass(path: Path) -> None:
    raw = read(path, validation_features="x_train", validation_labels="y_train")
    assert names(raw) == [("x_train", "y_train")] * 2
    assert not np.shares_memory(raw.parts[0].features.values, raw.parts[1].features.values)


def test_a_url_is_read(path: Path) -> None:
    with fsspec.open("memory://read_npz.npz", "wb") as file:
        file.write(path.read_bytes())
    assert len(read("memory://read_npz.npz").parts) == 2


@pytest.mark.parametrize("fields", [{"features": "x"}, {"validation_features": "x", "validation_labels": "y"}])
def test_a_missing_key_is_told_with_those_there_are(path: Path, fields: dict[str, str]) -> None:
    with pytest.raises(DataError, match=r"data\.npz has no array 'x'; its arrays are x_train, y_train, x_test, y_test"):
        read(path, **fields)


@pytest.mark.parametrize("content", [b"", b"x,y\n1,2\n", b"PK\x03\x04 and no more", b"\x80\x04K\x01."])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"data\.npz is not an \.npz file"):
        read(tmp_path / "data.npz")


def test_a_single_array_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", np.zeros(3))
    with pytest.raises(DataError, match=r"data\.npy is not an \.npz file but one array"):
        read(tmp_path / "data.npy")


def test_a_truncated_archive_is_refused(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"is not an \.npz file"):
        read(path)


def test_a_damaged_array_is_refused(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content.replace(KERAS["x_train"].tobytes(), bytes(KERAS["x_train"].nbytes), 1))
    with pytest.raises(DataError, match="x_train cannot be read: Bad CRC"):
        read(path)


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x_train=np.array([{}, None]), y_train=np.zeros(2))
    with pytest.raises(DataError, match=re.escape("x_train cannot be read: Object arrays")):
        read(tmp_path / "data.npz")


def test_a_member_that_is_no_array_is_refused(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("notes", "hello")
    with pytest.raises(DataError, match="notes is not an array"):
        read(path, labels="notes")
