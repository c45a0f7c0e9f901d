from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import fsspec
import pytest

from psgd_workers.data.file import open_file
from psgd_workers.errors import DataError


def test_a_local_path_is_read(tmp_path: Path) -> None:
    path = tmp_path / "some[1]*.bin"
    path.write_bytes(b"123")
    with open_file(str(path), "rb") as file:
        assert file.read() == b"123"


def test_a_url_is_read() -> None:
    with fsspec.open("memory://open_file.txt", "wb") as file:
        file.write("\ufeffñ\r\n".encode())
    with open_file("memory://open_file.txt", "rt", encoding="utf-8-sig", newline="") as file:
        assert file.read() == "ñ\r\n"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match=r"absent\.npz does not exist; check data\.path"),
        open_file(str(tmp_path / "absent.npz"), "rb"),
    ):
        pass


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"cannot read {tmp_path}.*directory"), open_file(str(tmp_path), "rb"):
        pass


def test_an_unreadable_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Locked:
        def __enter__(self) -> NoReturn:
            raise PermissionError(13, "Permission denied")

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(fsspec, "open", lambda *_: Locked())  # the tests may run as root, who may read everything
    with pytest.raises(DataError, match=r"data\.npz may not be read by this user"), open_file("data.npz", "rb"):
        pass


def test_an_unknown_protocol_is_refused() -> None:
    with (
        pytest.raises(DataError, match=r"cannot open nowhere://data\.npz: .*nowhere"),
        open_file("nowhere://data.npz", "rb"),
    ):
        pass


def test_a_protocol_whose_package_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_package(*_: object) -> NoReturn:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "open", without_package)
    with pytest.raises(DataError, match="Install s3fs to access S3"), open_file("s3://bucket/data.npz", "rb"):
        pass


def test_errors_of_the_reader_pass_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.touch()
    with pytest.raises(ZeroDivisionError), open_file(str(path), "rb"):
        raise ZeroDivisionError
