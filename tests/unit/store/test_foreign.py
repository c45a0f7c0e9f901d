from __future__ import annotations

import os
import socket
from pathlib import Path
from uuid import uuid4

import pytest

from psgd.store import foreign
from psgd.store.foreign import TakenFile, take_files
from psgd.store.storage import Storage

MOST = 100  # largest size of a file, bytes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder that any process may write to."""
    (tmp_path / "box").mkdir()
    return tmp_path / "box"


def take(folder: Path, number: int = 10, taken: set[str] | None = None) -> list[TakenFile]:
    names = set() if taken is None else taken
    return take_files(str(folder), str(folder.parent / "refused"), number, MOST, names)


def test_regular_files_are_read_in_order_and_deleted(folder: Path) -> None:
    for name in ("2", "1", "3"):
        (folder / name).write_text(name)
    assert [(file.name, file.data) for file in take(folder, 2)] == [("1", b"1"), ("2", b"2")]
    assert [file.name for file in take(folder)] == ["3"]
    assert list(folder.iterdir()) == []


def test_a_file_that_is_being_written_is_left_alone(folder: Path) -> None:
    (folder / ".1.json-part").write_text("{")
    assert take(folder) == []
    assert [path.name for path in folder.iterdir()] == [".1.json-part"]


def test_a_file_that_is_too_large_is_not_read_beyond_the_limit(folder: Path) -> None:
    with (folder / "huge").open("wb") as file:
        file.truncate(2**40)
    (folder / "fits").write_bytes(b"x" * MOST)
    fits, huge = take(folder)
    assert fits.data == b"x" * MOST
    assert (huge.data, huge.fault) == (None, "it has more than 100 bytes")
    assert list(folder.iterdir()) == []


def test_what_is_no_regular_file_is_moved_aside_unopened(folder: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    (folder / "directory").mkdir()
    (folder / "directory" / "file").write_text("kept")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "device").symlink_to("/dev/zero")
    (folder / "link").symlink_to(precious / "file")
    (folder / "linked-directory").symlink_to(precious)
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
    assert {(file.name, file.data, file.fault) for file in take(folder)} == {
        (name, None, "it is not a regular file")
        for name in ("directory", "dangling", "device", "link", "linked-directory", "pipe", "socket")
    }
    assert list(folder.iterdir()) == []
    assert len(list((tmp_path / "refused").iterdir())) == 7
    assert (precious / "file").read_text() == "kept"


def test_a_folder_that_is_a_link_is_not_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "file").write_text("foreign")
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(NotADirectoryError):
        take(tmp_path / "link")
    assert (folder / "file").exists()


def test_of_a_folder_that_is_not_there_nothing_is_taken(folder: Path) -> None:
    assert take(folder / "nowhere") == []


def test_of_many_entries_a_bounded_number_is_looked_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "MOST_SCANNED", 5)
    for number in range(12):
        (folder / f"{number:02d}").touch()
    assert [len(take(folder, 4)) for _ in range(5)] == [4, 4, 4, 0, 0]


def test_an_entry_that_cannot_be_deleted_is_taken_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "1").touch()
    taken: set[str] = set()
    with monkeypatch.context() as patched:
        patched.setattr(foreign, "_remove", lambda *arguments: False)
        assert [len(take(folder, taken=taken)) for _ in range(2)] == [1, 0]
    (folder / "2").touch()
    assert [file.name for file in take(folder, taken=taken)] == ["2"]
    assert (taken, list(folder.iterdir())) == (set(), [])


def test_a_file_that_cannot_be_opened_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "1").touch()
    opened = os.open

    def refuse(path: str, flags: int, *, dir_fd: int | None = None) -> int:
        if path == "1":
            raise PermissionError(13, "Permission denied")
        return opened(path, flags, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", refuse)
    assert [file.fault for file in take(folder)] == ["it cannot be read: Permission denied"]


def test_of_an_object_store_files_are_taken_likewise() -> None:
    storage = Storage(f"memory://{uuid4().hex}/run")
    for name, size in (("2", 1), ("1", MOST), ("3", MOST + 1), (".part", 1), ("folder/file", 1)):
        storage.write(f"box/{name}", b"x" * size)
    taken: set[str] = set()
    assert [(file.name, file.data, file.fault) for file in storage.take_out("box", 10, MOST, taken)] == [
        ("1", b"x" * MOST, ""),
        ("2", b"x", ""),
        ("3", None, "it has more than 100 bytes"),
        ("folder", None, "it is not a file"),
    ]
    assert storage.take_out("box", 10, MOST, taken) == []
    assert storage.names("box") == [".part", "folder"]
    assert taken == {"folder"}
    assert storage.take_out("nowhere", 10, MOST, taken) == []
