from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from psgd.core.context import RunContext
from psgd.core.driver.events import Commit, Committed, Saved, SaveFailed
from psgd.core.server.journal import RECORD
from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.partitions import partition_weights
from psgd.errors import CheckpointError, OwnershipError, StorageError
from psgd.jsontext import MOST_BYTES
from psgd.store.checkpoint_part import Part, write_part
from psgd.store.checkpoint_writer import CheckpointWriter
from psgd.store.checkpoints import Checkpoints
from psgd.store.manifest import Manifest
from psgd.store.run_directory import RunDirectory
from psgd.store.storage import Storage
from psgd_workers.gradients.layout import Layout
from psgd_workers.messages import Version
from tests.support.jobs import GRID, START, job

SERVERS = 2
SPEC = job(checkpoint={"every_s": None, "keep": 2})
LAYOUT = Layout.of({"weight": START})
PARTITIONS = partition_weights(len(START), len(START), SERVERS)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """Return the directory of a run that this process owns."""
    run = RunDirectory(Storage(str(tmp_path / "run")))
    run.begin(SPEC)
    run.own()
    return run


def checkpoint_writer(run: RunDirectory, resumed: str | None = None) -> CheckpointWriter:
    context = RunContext(SPEC, LAYOUT, GRID, PARTITIONS, "driver", run.storage.url)
    return CheckpointWriter(run, context, "data", "job", Checkpoints(run.storage).open(resumed) if resumed else None)


def write(run: RunDirectory, name: str, updates: int) -> list[Part]:
    """Write the parts of all servers."""
    servers = [
        ParameterServer(SPEC, part, START[part.start : part.stop], GRID, Version(1, updates + part.number))
        for part in PARTITIONS
    ]
    return [write_part(run.storage, name, server.state(), np.zeros(0, RECORD)) for server in servers]


def save(run: RunDirectory, writer: CheckpointWriter, number: int, updates: int) -> Committed | SaveFailed:
    """Write and commit a checkpoint."""
    name = writer.begin(number)
    for part in write(run, name, updates):
        assert writer.add_part(number, part) == Saved(part.partition, number, updates + part.partition, 0)
    return writer.commit(Commit(number, updates, 0), requeued=3)


def origin(writer: CheckpointWriter) -> str | None:
    """Return the checkpoint that a server started now would be restored from."""
    writer.refresh_origin()
    return writer.origin.manifest.name if writer.origin else None


def recorded(run: RunDirectory, kind: str) -> list[str]:
    lines = run.read_lines("events.jsonl") if run.storage.exists("events.jsonl") else []
    return [str(line.get("fault", line.get("name"))) for line in lines if line["event"] == kind]


def test_what_is_committed_is_what_its_parts_and_the_run_say(run: RunDirectory) -> None:
    writer = checkpoint_writer(run)
    assert save(run, writer, 7, updates=20) == Committed(7)
    assert writer.committed == recorded(run, "checkpoint") == ["000007-1"]
    manifest = Checkpoints(run.storage).manifest("000007-1")
    assert (manifest.updates, manifest.requeued, manifest.partitions) == (20, 3, SERVERS)
    assert (manifest.spec_hash, manifest.data_fingerprint, manifest.layout) == ("job", "data", LAYOUT)
    np.testing.assert_array_equal(Checkpoints(run.storage).open("000007-1").weights(), START)


def test_as_many_are_kept_as_the_job_says(run: RunDirectory) -> None:
    writer = checkpoint_writer(run)
    for number in range(4):
        save(run, writer, number, updates=10 * number)
    assert Checkpoints(run.storage).committed() == ["000002-1", "000003-1"]
    assert writer.committed == [f"00000{number}-1" for number in range(4)]


def test_a_driver_that_lost_the_run_commits_nothing(run: RunDirectory) -> None:
    writer = checkpoint_writer(run)
    other = RunDirectory(Storage(run.storage.url))
    other.own()
    with pytest.raises(OwnershipError, match="taken over"):
        save(run, writer, 0, updates=10)
    assert Checkpoints(run.storage).committed() == writer.committed == []


def test_a_driver_that_loses_the_run_at_a_commit_deletes_nothing(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = checkpoint_writer(run)
    commit = Checkpoints.commit
    for number in range(2):
        save(run, writer, number, updates=10 * number)

    def commits_late(checkpoints: Checkpoints, manifest: Manifest) -> None:
        RunDirectory(Storage(run.storage.url)).own()
        # The other driver may continue from either.
        assert Checkpoints(run.storage).committed() == ["000000-1", "000001-1"]
        commit(checkpoints, manifest)

    monkeypatch.setattr(Checkpoints, "commit", commits_late)
    with pytest.raises(OwnershipError):
        save(run, writer, 2, updates=20)
    assert Checkpoints(run.storage).committed() == ["000000-1", "000001-1", "000002-1"]


def test_a_commit_that_storage_refuses_is_told_and_the_next_one_made(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = checkpoint_writer(run)

    def full(*_: object) -> None:
        raise StorageError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "commit", full)
        assert save(run, writer, 0, updates=10) == SaveFailed(0, "the disk is full")
    assert writer.committed == []
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "prune", full)
        assert save(run, writer, 1, updates=10) == Committed(1)
    assert (writer.committed, recorded(run, "not_deleted")) == (["000001-1"], ["the disk is full"])


def test_a_lost_servers_successor_goes_on_from_the_newest_that_is_whole(run: RunDirectory) -> None:
    writer = checkpoint_writer(run)
    assert origin(writer) is None  # the initial weights
    for number in range(2):
        save(run, writer, number, updates=10 * number)
    assert origin(writer) == "000001-1"
    run.storage.delete("checkpoints/000001-1/server-0.safetensors")
    assert origin(writer) == "000000-1"
    assert "000001-1" in recorded(run, "checkpoint_refused")[0]


def test_a_newer_one_of_a_branch_that_was_given_up_is_passed_over(run: RunDirectory) -> None:
    given_up = checkpoint_writer(run)
    for number in range(2):
        save(run, given_up, number, updates=10 * number)
    resumed = checkpoint_writer(run, resumed="000000-1")
    assert resumed.committed == ["000000-1"]
    assert origin(resumed) == "000000-1"
    assert recorded(run, "checkpoint_refused") == [
        "checkpoint 000001-1 is not part of this run's history; psgd tries the previous checkpoint"
    ]


def refuse_commits(patch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise StorageError("the disk is full")

    patch.setattr(Checkpoints, "commit", full)


def test_commits_that_fail_leave_one_directory_behind(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = checkpoint_writer(run)
    assert save(run, writer, 1, updates=10) == Committed(1)
    with monkeypatch.context() as patch:
        refuse_commits(patch)
        for number in range(2, 13):
            assert save(run, writer, number, updates=10 * number) == SaveFailed(number, "the disk is full")
            assert Checkpoints(run.storage).names() == ["000001-1", f"{number:06d}-1"]
    assert save(run, writer, 13, updates=130) == Committed(13)
    assert Checkpoints(run.storage).names() == ["000001-1", "000013-1"]


def test_saves_that_fail_leave_one_directory_behind(run: RunDirectory) -> None:
    writer = checkpoint_writer(run)
    for number in range(1, 6):  # one server dies each time before it has written its part
        write(run, writer.begin(number), updates=10)
        assert Checkpoints(run.storage).names() == [f"{number:06d}-1"]


def test_a_driver_that_starts_deletes_what_earlier_ones_did_not_commit(run: RunDirectory) -> None:
    for name in ("000001-1", "000002-1", "000003-1"):
        write(run, name, updates=10)
    later = RunDirectory(run.storage)
    later.own()
    writer = checkpoint_writer(later)
    writer.delete_unfinished()
    assert Checkpoints(run.storage).names() == ["000003-1"]  # the former driver may be committing it
    assert len(list((Path(run.storage.url) / "journal").iterdir())) == 3 * SERVERS  # a replay needs them
    save(later, writer, 4, updates=20)
    assert Checkpoints(run.storage).names() == ["000004-2"]


def test_nothing_is_deleted_that_a_newer_owner_may_be_writing(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = checkpoint_writer(run)
    write(run, writer.begin(1), updates=10)
    later = RunDirectory(Storage(run.storage.url))
    later.own()
    write(run, "000002-2", updates=10)
    for delete in (writer.delete_unfinished, lambda: writer.begin(3)):
        with pytest.raises(OwnershipError):
            delete()
    monkeypatch.setattr(RunDirectory, "check_owner", lambda run: None)  # as if it was taken over after the check
    writer.begin(4)
    assert Checkpoints(run.storage).names() == ["000002-2"]


def test_a_directory_that_cannot_be_deleted_is_recorded(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise StorageError("read-only")

    writer = checkpoint_writer(run)
    write(run, writer.begin(1), updates=10)
    monkeypatch.setattr(Checkpoints, "delete_unfinished", refuse)
    assert writer.begin(2) == "000002-1"
    assert recorded(run, "not_deleted") == ["read-only"]


OWNERS = {
    "deep": b"[" * 100_000,
    "other types": b'{"driver": 1, "incarnation": "x"}',
    "huge": b" " * (MOST_BYTES + 1),
    "empty": b"",
}


@pytest.mark.parametrize("text", OWNERS.values(), ids=OWNERS.keys())
def test_a_damaged_owner_lets_a_commit_fail_and_the_next_one_succeed(run: RunDirectory, text: bytes) -> None:
    writer = checkpoint_writer(run)
    owner = run.storage.read("owner")
    run.storage.write("owner", text)
    failed = save(run, writer, 1, updates=10)
    assert isinstance(failed, SaveFailed)
    assert "/owner is damaged" in failed.cause
    assert Checkpoints(run.storage).committed() == []
    run.storage.write("owner", owner)
    assert save(run, writer, 2, updates=20) == Committed(2)


def test_damaged_manifests_do_not_keep_a_driver_from_committing_and_deleting(run: RunDirectory) -> None:
    writer = checkpoint_writer(run)
    texts = [b"[" * 100_000, b"{}", b" " * (MOST_BYTES + 1), b'{"format": 1', b"\xff"]
    for number, text in enumerate(texts):
        assert save(run, writer, number, updates=10 * number) == Committed(number)
        run.storage.write(f"checkpoints/{number:06d}-1/COMMITTED", text)
        with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"):
            writer.refresh_origin()
    assert save(run, writer, 9, updates=90) == Committed(9)
    assert origin(writer) == "000009-1"
    assert save(run, writer, 10, updates=100) == Committed(10)
    assert Checkpoints(run.storage).names() == ["000009-1", "000010-1"]
