from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.partitions import partition_weights
from psgd.errors import CheckpointError, JournalError, ResumeError
from psgd.job import OpenJob
from psgd.replay.replay import replay
from psgd.spec import JobSpec
from psgd.store.checkpoint_part import write_part
from psgd.store.checkpoints import Checkpoints
from psgd.store.resuming import check_checkpoint, find_checkpoint
from psgd.store.run_directory import RunDirectory
from psgd_workers.counting import counted
from psgd_workers.messages import Version
from tests.support.checkpoints import fail, manifest
from tests.support.recorded_run import digits, run_directory


@pytest.fixture(scope="module")
def job() -> OpenJob:
    return OpenJob.open(digits())


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = run_directory(tmp_path)
    directory.own()
    directory.begin(digits())
    return directory


def commit(run: RunDirectory, job: OpenJob, name: str, versions: tuple[int, ...], **context: Any) -> None:
    """Commit a checkpoint of servers that made no push, one for each of the versions."""
    parts = []
    partitions = partition_weights(job.layout.num_parameters, job.layout.num_trainable, len(versions))
    for partition, updates in zip(partitions, versions, strict=True):
        weights = job.weights[partition.start : partition.stop]
        version = Version(int(name.partition("-")[2]), updates)
        server = ParameterServer(job.spec, partition, weights, job.shards.grid, version)
        if version.incarnation > 1:
            server.journal.fork(0.0, Version(1, updates), version)
        parts.append(write_part(run.storage, name, server.state(), server.journal.take()))
    layout = job.layout
    known = {
        "spec_hash": job.spec.identity_hash(),
        "data_fingerprint": job.dataset.fingerprint,
        "names": layout.names,
        "shapes": layout.shapes,
        "num_trainable": layout.num_trainable,
        "settings": job.spec.settings,
        "journal": {file: checksum for part in parts for file, checksum in part.journal.items()},
    }
    Checkpoints(run.storage).commit(manifest(name, parts).model_copy(update=known | context))


def spec(servers: int) -> JobSpec:
    return digits(scaling={"workers": 3, "servers": servers})


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew_without_a_word(run: RunDirectory, job: OpenJob) -> None:
    assert find_checkpoint(run, job.spec, fail) is None  # nothing was committed yet
    commit(run, job, "000001-1", (3,))
    run.event("checkpoint", name="000001-1", updates=3, epochs=0, deleted=[])
    assert find_checkpoint(run, job.spec, fail) is not None
    run.storage.delete("checkpoints")
    with pytest.raises(ResumeError, match=r"checkpoint 000001-1 was committed, .*restore the folder .*another --name"):
        find_checkpoint(run, job.spec, fail)


def test_a_run_whose_only_checkpoint_lost_its_end_is_not_begun_anew(run: RunDirectory, job: OpenJob) -> None:
    commit(run, job, "000001-1", (3,))
    run.event("checkpoint", name="000001-1", updates=3, epochs=0, deleted=[])
    run.storage.write("checkpoints/000001-1/COMMITTED", b"{")
    told: list[str] = []
    with pytest.raises(CheckpointError, match=r"every checkpoint .* is damaged"):
        find_checkpoint(run, job.spec, told.append)
    assert "its COMMITTED is cut short" in told[0]


def test_a_run_that_committed_nothing_starts_anew(run: RunDirectory) -> None:
    assert find_checkpoint(run, spec(1), refused=fail) is None


@pytest.mark.parametrize("servers", [1, 2, 3])
def test_servers_in_step_can_be_cut_anew(run: RunDirectory, job: OpenJob, servers: int) -> None:
    commit(run, job, "000001-1", (5, 5))
    found = find_checkpoint(run, spec(servers), refused=fail)
    assert found is not None
    for partition in partition_weights(job.layout.num_parameters, job.layout.num_trainable, servers):
        part = found.state_for(partition, servers)
        assert part.metadata["partition"] == list(partition)
        np.testing.assert_array_equal(part.arrays["weights"], job.weights[partition.start : partition.stop])


def test_the_newest_that_can_be_cut_is_used_and_this_is_told(run: RunDirectory, job: OpenJob) -> None:
    commit(run, job, "000001-1", (5, 5))
    commit(run, job, "000002-1", (8, 9))
    told: list[str] = []
    found = find_checkpoint(run, spec(3), refused=told.append)
    assert found is not None
    assert found.manifest.name == "000001-1"
    assert told == [
        "checkpoint 000002-1 is of 2 servers and cannot be repartitioned for 3, because partitions 0 and 1 made 8 and "
        "9 updates; psgd tries the previous checkpoint"
    ]
    same = find_checkpoint(run, spec(2), refused=fail)  # as many servers as the newest checkpoint has
    assert same is not None
    assert same.manifest.name == "000002-1"


def test_if_none_can_be_cut_the_way_out_is_told(run: RunDirectory, job: OpenJob) -> None:
    commit(run, job, "000001-1", (8, 9))
    with pytest.raises(
        ResumeError, match=r"can be repartitioned for 3 servers.*Resume with scaling\.servers=2, end the run"
    ):
        find_checkpoint(run, spec(3), refused=lambda _: None)


def test_a_checkpoint_of_another_job_is_refused(run: RunDirectory, job: OpenJob) -> None:
    commit(run, job, "000001-1", (5,), spec_hash="another")
    with pytest.raises(ResumeError, match=r"checkpoint 000001-1 .* is of another job"):
        find_checkpoint(run, spec(1), refused=fail)


def test_other_data_or_another_model_is_refused(run: RunDirectory, job: OpenJob) -> None:
    commit(run, job, "000001-1", (5,))
    known = Checkpoints(run.storage).manifest("000001-1")
    check_checkpoint(known, job, "run")
    with pytest.raises(ResumeError, match="the data of run is not what it was trained on"):
        check_checkpoint(known.model_copy(update={"data_fingerprint": "x"}), job, "run")
    with pytest.raises(ResumeError, match="the model of run has other tensors"):
        check_checkpoint(known.model_copy(update={"num_trainable": 1}), job, "run")


def test_data_is_compared_by_its_content_not_by_its_path(run: RunDirectory, tmp_path: Path) -> None:
    arrays = {"x_train": np.eye(8), "y_train": np.arange(8) % 2, "x_test": np.eye(8)[:4], "y_test": np.arange(4) % 2}

    def opened(path: Path, **changes: Any) -> OpenJob:
        np.savez(path, **arrays | changes)
        return OpenJob.open(digits(data={"format": "npz", "path": str(path), "batch_size": 2}))

    before = opened(tmp_path / "before.npz")
    commit(run, before, "000001-1", (5,))
    moved = opened(tmp_path / "after.npz")
    found = find_checkpoint(run, moved.spec, refused=fail)
    assert found is not None
    check_checkpoint(found.manifest, moved, "run")
    changes: dict[str, Any]
    for changes in ({"x_test": np.eye(8)[4:]}, {"y_test": np.arange(1, 5) % 2}, {"y_train": np.arange(1, 9) % 2}):
        with pytest.raises(ResumeError, match="the data of run is not what it was trained on"):
            check_checkpoint(found.manifest, opened(tmp_path / "after.npz", **changes), "run")


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3)])
def test_a_run_that_was_cut_anew_has_no_replay(run: RunDirectory, job: OpenJob, before: int, after: int) -> None:
    run.event("started", incarnation=1, resumed=None, workers=3, servers=before)
    commit(run, job, "000001-1", (5,) * before)
    run.event("checkpoint", name="000001-1")
    run.event("started", incarnation=2, resumed="000001-1", workers=3, servers=after)
    commit(run, job, "000002-2", (5,) * after)
    run.event("checkpoint", name="000002-2")
    resolved = json.loads(run.storage.read("resolved.json"))
    assert resolved["scaling"]["servers"] == 1
    with pytest.raises(
        JournalError, match=rf"by {counted(before, 'server')} before it was resumed with {after}.*cannot be replayed"
    ):
        replay(run)
