"""Checkpoints on storage that fails, stalls or truncates: none that is committed is ever wrong."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from psgd.core.server.state import ServerState
from psgd.errors import CheckpointError, StorageError
from psgd.store.checkpoints import Checkpoints
from psgd.store.storage import Storage
from tests.support.checkpoints import fail, save, state
from tests.support.faulty_storage import FaultyFilesystem


@pytest.fixture
def faulty() -> Iterator[FaultyFilesystem]:
    made = FaultyFilesystem()
    yield made
    made.go_on.set()


def is_right(run: Storage, least: str) -> None:
    """The newest committed one is whole and not older than `least`."""
    newest = Checkpoints(run).newest(refused=fail)
    assert newest is not None
    assert newest.manifest.name >= least
    for partition in (0, 1):
        assert_same(newest.state(partition), state(partition))


def assert_same(one: ServerState, other: ServerState) -> None:
    assert one.metadata == other.metadata
    assert {name: array.tobytes() for name, array in one.arrays.items()} == {
        name: array.tobytes() for name, array in other.arrays.items()
    }


ERRORS = [OSError("scripted"), ValueError("scripted"), RuntimeError("a library's own error"), TimeoutError("scripted")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_operation_that_fails_leaves_the_newest_checkpoint_right(faulty: FaultyFilesystem, error: Exception) -> None:
    run = faulty.storage()
    save(run, "000001-1")
    saved = "000001-1"
    number = 2
    for nth in range(1, 60):
        begin = faulty.operations
        name = f"{number:06d}-1"
        faulty.fails = lambda now, what, path, last=begin + nth: error if now == last else None  # type: ignore[misc]
        try:
            save(run, name)
            saved = name
            Checkpoints(run).prune(2)
        except StorageError:
            faulty.fails = lambda now, what, path: None
        else:
            faulty.fails = lambda now, what, path: None
            break  # there are no more operations
        number += 1
        is_right(run, least=saved)
        Checkpoints(run).prune(2)
    else:
        raise AssertionError("every operation was tried")
    assert nth > 10
    is_right(run, least=saved)
    assert len(Checkpoints(run).names()) == 2  # what was left unfinished is gone


@pytest.mark.parametrize("file", ["server-0.safetensors", "server-1.json", "COMMITTED", "server-1.npy"])
def test_storage_that_truncates_is_found_out_before_anything_is_committed(faulty: FaultyFilesystem, file: str) -> None:
    run = faulty.storage()
    save(run, "000001-1")
    faulty.halves = lambda path: path.endswith(file)
    with pytest.raises(StorageError, match=r"\d+ bytes were written, but the file has \d+"):
        save(run, "000002-1")
    told: list[str] = []
    newest = Checkpoints(run).newest(refused=told.append)
    assert newest is not None
    assert newest.manifest.name == "000001-1"
    assert len(told) == (file == "COMMITTED")
    assert all("000002-1" in fault and "its COMMITTED is cut short" in fault for fault in told)
    Checkpoints(run).delete_unfinished("000003-1")
    assert Checkpoints(run).names() == ["000001-1"]


@pytest.mark.parametrize("file", ["server-0.safetensors", "COMMITTED"])
def test_storage_that_stalls_is_given_up_after_a_while(faulty: FaultyFilesystem, file: str) -> None:
    run = faulty.storage(patience_s=0.2)
    save(run, "000001-1")
    faulty.stalls = lambda path: path.endswith(file)
    began = time.monotonic()
    with pytest.raises(StorageError, match=rf"cannot write '.*{file}' in memory://.*: no answer within 0\.2 s"):
        save(run, "000002-1")
    assert time.monotonic() - began < 5
    is_right(run, least="000001-1")


def test_what_was_stalled_and_arrives_late_harms_nothing(faulty: FaultyFilesystem) -> None:
    run = faulty.storage(patience_s=0.2)
    faulty.stalls = lambda path: path.endswith("000001-1/COMMITTED")
    with pytest.raises(StorageError):
        save(run, "000001-1")
    save(run, "000002-1")
    faulty.go_on.set()
    deadline = time.monotonic() + 10
    while len(Checkpoints(run).committed()) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert Checkpoints(run).committed() == ["000001-1", "000002-1"]
    is_right(run, least="000002-1")


def test_a_checkpoint_that_cannot_be_read_gives_way_and_this_is_told(faulty: FaultyFilesystem) -> None:
    run = faulty.storage()
    save(run, "000001-1")
    save(run, "000002-1")
    faulty.fails = lambda now, what, path: OSError("gone") if what == "read" and "000002-1/server-0" in path else None
    told: list[str] = []
    newest = Checkpoints(run).newest(refused=told.append)
    assert newest is not None
    assert newest.manifest.name == "000001-1"
    (fault,) = told
    assert "000002-1" in fault
    assert "OSError: gone; psgd tries the previous checkpoint" in fault


def test_storage_of_which_nothing_can_be_read_is_told(faulty: FaultyFilesystem) -> None:
    run = faulty.storage()
    save(run, "000001-1")
    faulty.fails = lambda now, what, path: OSError("gone") if what == "read" else None
    with pytest.raises(CheckpointError, match=r"every checkpoint .* is damaged: .*OSError: gone"):
        Checkpoints(run).newest(refused=lambda _: None)
    faulty.fails = lambda now, what, path: OSError("gone") if what == "list" else None
    with pytest.raises(StorageError, match="cannot list 'checkpoints'"):
        Checkpoints(run).newest(refused=fail)


def test_a_probe_finds_storage_that_truncates_or_stalls(faulty: FaultyFilesystem) -> None:
    run = faulty.storage(patience_s=0.2)
    faulty.halves = lambda path: True
    with pytest.raises(StorageError, match="4 bytes were written, but the file has 2"):
        run.probe()
    faulty.halves = lambda path: False
    faulty.stalls = lambda path: True
    with pytest.raises(StorageError, match="no answer within"):
        run.probe()
