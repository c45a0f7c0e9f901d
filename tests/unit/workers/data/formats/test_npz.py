from __future__ import annotations

import re
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from psgd_workers.data import memory, open_dataset
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


def test_arrays_in_fortran_order_are_read_as_they_were(tmp_path: Path) -> None:
    features = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(3, 2))
    np.savez_compressed(tmp_path / "data.npz", x_train=features, y_train=np.asfortranarray(np.ones((3, 2))))
    (part,) = read(tmp_path / "data.npz").parts
    np.testing.assert_array_equal(part.features.values, features, strict=True)
    assert part.labels.values.shape == (3, 2)


# Hostile archives

GIB = 2**30


def npy(header: str, values: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    """Return an array as NumPy writes it, with this header."""
    size = len(header).to_bytes(2 if version == b"\x01\x00" else 4, "little")
    return b"\x93NUMPY" + version + size + header.encode("latin1") + values


def described(shape: str, dtype: str = "'<f4'") -> str:
    return f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}}}"


def archive(path: Path, *members: tuple[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in (*members, ("y_train.npy", npy(described("(2,)"), bytes(8)))):
            file.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(described("(1000000000000,)")), "declares 4,000,000,000,000 bytes of values, but the archive has 0 bytes"),
        (npy(described(f"({10**30},)")), "bytes of values, but the archive has 0 bytes"),
        (npy(described("(-2,)"), bytes(8)), "declares -8 bytes"),
        (npy(described("(-1, -2)"), bytes(8)), "declares 8 bytes"),
        (npy(described("(2,)"), bytes(12)), "declares 8 bytes of values, but the archive has 12 bytes"),
        (npy(described("(2,)", "'|O'"), b"\x80\x04K\x01."), "Object arrays are refused"),
        (npy(described("(2,)", "[('a', 'O')]"), bytes(16)), "Object arrays are refused"),
        (npy(described("(2,)", "'<f5'"), bytes(8)), "its header is damaged"),
        (npy(described("2"), bytes(8)), "its header is damaged"),
        (npy("(" * 9_000), "its header is damaged"),
        (npy("-" * 9_000), "its header is damaged"),
        (npy("[" * 90 + "]" * 90), "its header is damaged"),
        (npy("x" * 60_000), "its header is damaged"),
        (npy("{'descr': __import__('os').abort()}"), "its header is damaged"),
        (npy("\xff\x00"), "its header is damaged"),
        (npy(described("(2,)"), bytes(8), b"\x03\x00"), "its header is damaged"),
        (npy(described("(2,)"), bytes(8), b"\x09\x00"), "its header is damaged"),
        (npy(described(f"({'1,' * 70})"), bytes(4)), "cannot be read"),
        (b"\x93NUMPY\x01\x00\xff\xff", "its header is damaged"),
        (b"\x93NUMPY", "is not an array"),
        (b"", "is not an array"),
    ],
    ids=lambda value: repr(value[:50]) if isinstance(value, bytes) else "",
)
def test_an_array_that_is_not_as_its_header_says_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = archive(tmp_path / "data.npz", ("x_train.npy", content))
    tracemalloc.start()
    with pytest.raises(DataError, match=f"x_train .*{message}") as refused:
        read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(refused.value).isprintable()
    assert peak < 50e6


def test_an_array_that_python_2_wrote_is_read(tmp_path: Path) -> None:
    path = archive(tmp_path / "data.npz", ("x_train.npy", npy(described("(2L,)"), bytes(8))))
    assert read(path).parts[0].features.values.tolist() == [0, 0]


def test_a_small_file_that_unpacks_to_gigabytes_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "data.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        file.writestr("y_train.npy", npy(described("(2,)"), bytes(8)))
        with file.open("x_train.npy", "w") as member:
            member.write(npy(described(f"({GIB // 4},)")))
            for _ in range(64):
                member.write(bytes(GIB // 64))
    monkeypatch.setattr(memory, "free_memory", lambda: GIB // 2)
    tracemalloc.start()
    with pytest.raises(
        DataError, match=r"data\.npz needs 1,024 MiB of memory, but 512 MiB are free here: use a machine"
    ):
        read(tmp_path / "data.npz")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6


@pytest.mark.parametrize(
    ("compression", "number"), [(zipfile.ZIP_BZIP2, 12), (zipfile.ZIP_LZMA, 14)], ids=["bzip2", "lzma"]
)
def test_another_compression_is_refused(tmp_path: Path, compression: int, number: int) -> None:
    path = archive(tmp_path / "data.npz", ("x_train.npy", b"any"), compression=compression)
    with pytest.raises(DataError, match=f"x_train has the compression method {number}, which NumPy does not write"):
        read(path)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (8, 1, "is encrypted"),
        (8, 0x40, "cannot be read"),
        (10, 99, "the compression method 99"),
        (6, 99, "not an .npz"),
    ],
)
def test_a_flag_that_is_not_supported_is_refused(path: Path, place: int, value: int, message: str) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + place] = value
    content[content.index(b"PK\x03\x04") + place - 2] = value
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("second", ["x_train.npy", "x_train"])
def test_two_arrays_of_one_name_are_refused(tmp_path: Path, second: str) -> None:
    content = npy(described("(2,)"), bytes(8))
    path = archive(tmp_path / "data.npz", ("x_train.npy", content), (second, content))
    with pytest.raises(DataError, match="x_train is in the archive 2 times"):
        read(path)


def test_strange_names_of_arrays_are_shown_in_one_line(tmp_path: Path) -> None:
    names = ["../../etc/passwd", "/a", "a\n\x1b[31m", "é", "x" * 60_000, " ", *map(str, range(1_000))]
    path = archive(tmp_path / "data.npz", *((name, b"") for name in names))
    with pytest.raises(
        DataError, match=r"has no array 'x_train'; its arrays are .*, and 997 more: name one"
    ) as refused:
        read(path)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 1_000


@pytest.mark.parametrize("dtype", ["[('a', '<f4')]", "'<M8[s]'", "'<c8'", "'|V4'"])
def test_values_that_are_no_numbers_are_refused(tmp_path: Path, dtype: str) -> None:
    size = np.dtype(eval(dtype)).itemsize  # noqa: S307
    path = archive(tmp_path / "data.npz", ("x_train.npy", npy(described("(2,)", dtype), bytes(2 * size))))
    with pytest.raises(DataError, match=r"x_train (has dtype .*; expected integers, floats or bools|cannot be read)"):
        open_dataset(NpzData(format="npz", path=str(path)), 0)


@pytest.mark.parametrize("code", [0x110000, 0xFFFFFFFF, 0xD800], ids=hex)
def test_labels_that_are_no_valid_text_are_refused(tmp_path: Path, code: int) -> None:
    path = tmp_path / "data.npz"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x_train.npy", npy(described("(2,)"), bytes(8)))
        file.writestr("y_train.npy", npy(described("(2,)", "'<U1'"), code.to_bytes(4, "little") * 2))
    with pytest.raises(DataError, match="y_train holds text that is not valid Unicode"):
        open_dataset(NpzData(format="npz", path=str(path)), 0)


def test_a_file_cut_anywhere_is_refused(path: Path) -> None:
    content = path.read_bytes()
    for length in range(0, len(content), 3):
        path.write_bytes(content[:length])
        with pytest.raises(DataError):
            read(path)


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.chaos), 11])
def test_a_flipped_bit_anywhere_is_refused_or_changes_no_value(path: Path, step: int) -> None:
    content = path.read_bytes()
    for place in range(0, 8 * len(content), step):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            raw = read(path)
        except DataError:
            continue
        assert names(raw) == [("x_train", "y_train"), ("x_test", "y_test")]
        for array in (array for part in raw.parts for array in (part.features, part.labels)):
            np.testing.assert_array_equal(array.values, KERAS[array.name.rpartition(": ")[2]], strict=True)


def test_an_archive_of_very_many_members_is_refused_before_they_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "many.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(10_001):
            archive.writestr(f"{number}.npy", b"")
    with pytest.raises(DataError, match="lists more than 10,000 arrays: write only those that the job names"):
        read(path)
