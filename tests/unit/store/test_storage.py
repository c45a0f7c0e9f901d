from __future__ import annotations

import os
import stat
from pathlib import Path
from threading import Thread
from typing import NoReturn
from uuid import uuid4

import pytest

from psgd.errors import DamagedFileError, StorageError
from psgd.store.storage import Storage


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """Return a folder that does not exist yet: on a disk, then in an object store."""
    return Storage(str(tmp_path / "runs") if request.param == "local" else f"memory://{uuid4().hex}/runs")


def test_what_is_written_is_read_and_folders_come_by_themselves(storage: Storage) -> None:
    storage.write("a/b/file", b"\x00one")
    assert storage.read("a/b/file") == b"\x00one"
    storage.write("a/b/file", b"2")
    assert storage.read("a/b/file") == b"2"
    assert storage.names("a/b") == ["file"]  # and no temporary file beside it


def test_appending_creates_a_file_and_adds_to_it(storage: Storage) -> None:
    storage.append("log/lines", b"one\n")
    storage.append("log/lines", b"two\n")
    assert storage.read("log/lines") == b"one\ntwo\n"


def test_names_are_those_directly_in_a_folder_in_order(storage: Storage) -> None:
    for name in ("c/2/deep", "c/10", "c/1", "d"):
        storage.write(name, b"")
    assert storage.names("c") == ["1", "10", "2"]
    assert storage.names("nowhere") == []


def test_a_folder_is_a_storage_of_its_own(storage: Storage) -> None:
    storage.folder("run").write("file", b"x")
    assert storage.folder("run").url == f"{storage.url}/run"
    assert storage.read("run/file") == b"x"
    assert storage.exists("run")
    assert storage.exists("run/file")
    assert not storage.exists("run/other")


def test_deleting_takes_a_file_or_a_whole_folder(storage: Storage) -> None:
    for name in ("a/x", "a/b/y", "c"):
        storage.write(name, b"")
    storage.delete("c")
    storage.delete("a")
    assert not storage.exists("c")
    assert not storage.exists("a/b/y")
    with pytest.raises(StorageError, match="cannot delete 'c'"):
        storage.delete("c")


def test_a_probe_leaves_nothing(storage: Storage) -> None:
    storage.probe()
    assert storage.names("") == []


def test_a_missing_file_is_named_with_its_folder(storage: Storage) -> None:
    storage.write("there", b"")
    with pytest.raises(StorageError, match=rf"cannot read 'missing' in {storage.url}: FileNotFoundError"):
        storage.read("missing")


def test_a_reader_never_sees_a_file_half_written(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write("owner", b"the old one, longer than the new")
    with (tmp_path / "owner").open("rb", buffering=0) as reader:
        storage.write("owner", b"new")
        assert reader.read() == b"the old one, longer than the new"
    assert storage.read("owner") == b"new"


@pytest.mark.parametrize("action", ["write", "append"])
def test_where_nothing_can_be_written_the_reason_is_told(tmp_path: Path, action: str) -> None:
    (tmp_path / "file").touch()
    storage = Storage(str(tmp_path / "file"))
    with pytest.raises(StorageError, match=r"cannot write .* in .*file: \w+Error"):
        getattr(storage, action)("name", b"")
    with pytest.raises(StorageError, match="cannot write"):
        storage.probe()


def test_a_machine_that_has_no_thread_left_is_a_fault_of_the_storage(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(thread: Thread) -> NoReturn:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Thread, "start", fail)
    with pytest.raises(StorageError, match=r"cannot write 'a' .*RuntimeError: can't start new thread"):
        storage.append("a", b"")


def test_a_file_of_more_bytes_than_are_wanted_is_not_read(storage: Storage) -> None:
    storage.write("a", b"four")
    assert storage.read("a", 4) == b"four"
    with pytest.raises(StorageError, match=r"/a is damaged \(it has more than 3 bytes\): restore"):
        storage.read("a", 3)


def test_a_filesystem_that_is_not_installed_is_refused() -> None:
    with pytest.raises(StorageError, match=r"cannot open storage 'nosuch://bucket/runs'.*nosuch"):
        Storage("nosuch://bucket/runs")


def test_a_relative_path_and_a_home_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Storage("runs").url == str(tmp_path / "runs")
    assert Storage("~/runs").url == str(tmp_path / "home" / "runs")


def test_a_path_is_as_good_as_its_text(tmp_path: Path) -> None:
    assert Storage(tmp_path / "runs").url == Storage(str(tmp_path / "runs")).url


def test_a_url_that_a_path_has_changed_is_refused() -> None:
    with pytest.raises(StorageError, match=r"'s3:/bucket/runs' is a URL without one of its slashes: .* as a string"):
        Storage(Path("s3://bucket/runs"))


def test_a_pipe_or_a_device_in_place_of_a_file_is_damaged_and_not_opened(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        for most_bytes in (None, 10):
            with pytest.raises(DamagedFileError, match=rf"/{name} is damaged \(it is not a regular file\): restore"):
                storage.read(name, most_bytes)


@pytest.mark.parametrize("mask", [0o077, 0o027, 0o002])
def test_files_and_folders_have_the_modes_that_the_umask_leaves(tmp_path: Path, mask: int) -> None:
    storage = Storage(tmp_path / "run")
    before = os.umask(mask)
    try:
        storage.write("checkpoints/1/COMMITTED", b"x")
        storage.append("journal/events.jsonl", b"x")
        storage.write("commands/1.json", b"x")
        (tmp_path / "run" / "commands" / "folder").mkdir()
        storage.take_out("commands", 10, 10, set())
    finally:
        os.umask(before)
    entries = [tmp_path / "run", *(tmp_path / "run").rglob("*")]
    assert {"refused", "COMMITTED", "events.jsonl"} <= {entry.name for entry in entries}
    assert [entry.name for entry in entries if stat.S_IMODE(entry.stat().st_mode) & mask] == []
