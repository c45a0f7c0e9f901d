"""Deaths of servers, workers and drivers on a real local Ray."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import psgd
from psgd.cluster.session import session
from psgd.errors import RunFailedError
from psgd.store.run_directory import RunDirectory
from psgd.store.storage import Storage
from tests.support.command_line import LIMIT_S, eventually, recorded
from tests.support.digits_run import (
    BATCHES,
    ENDLESS,
    assert_stopped_exactly,
    job,
    stop_after_epochs,
    training,
)
from tests.support.killer import ray_processes

SERVER = "ray::ServerActor"
WORKER = "ray::WorkerActor"


@pytest.fixture(autouse=True)
def no_earlier_actors(local_ray: Path) -> None:
    """Wait until the processes of the test before are gone: Ray ends them late, and a kill must not hit one of them."""
    eventually(lambda: not ray_processes(SERVER, str(local_ray)) and not ray_processes(WORKER, str(local_ray)))


def kill(prefix: str, home: Path) -> None:
    """Kill the first process of the local Ray whose command line begins with `prefix`."""
    os.kill(ray_processes(prefix, str(home))[0], signal.SIGKILL)


@pytest.mark.parametrize("servers", [1, 2])
def test_a_server_that_dies_is_restored_and_the_run_goes_on(tmp_path: Path, local_ray: Path, servers: int) -> None:
    run = tmp_path / "run"
    with training(job(tmp_path, ENDLESS, scaling={"workers": 2, "servers": servers})) as under_way:
        eventually(lambda: recorded(run, "checkpoint"))
        kill(SERVER, local_ray)
        eventually(lambda: recorded(run, "server_restored"))
        stop_after_epochs(run)
        result = under_way.result(LIMIT_S)
    assert_stopped_exactly(result)
    assert result.failures == {"server_lost": 1}
    (restored,) = recorded(run, "server_restored")
    assert restored["batches_lost"] >= 0
    assert recorded(run, "server_started")[-1]["checkpoint"] is not None


def test_a_server_that_dies_before_the_first_checkpoint_begins_again(tmp_path: Path, local_ray: Path) -> None:
    run = tmp_path / "run"
    with training(job(tmp_path, ENDLESS, checkpoint={"every_s": None})) as under_way:
        eventually(lambda: recorded(run, "worker_up"))
        kill(SERVER, local_ray)
        eventually(lambda: len(recorded(run, "server_started")) == 2)
        stop_after_epochs(run)
        result = under_way.result(LIMIT_S)
    assert_stopped_exactly(result)
    assert recorded(run, "server_started")[-1]["checkpoint"] is None


def test_a_second_driver_goes_on_from_what_the_first_saved_until_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    begin = session
    checkpoint = {"every_s": None, "every_updates": 20, "keep": 1}

    @contextmanager
    def slowly(spec: psgd.JobSpec, address: str | None) -> Iterator[None]:
        """Start slowly: meanwhile the first driver deletes every checkpoint that was there when the second one came."""
        seen = recorded(run, "checkpoint")[-1]["name"]
        with begin(spec, address):
            eventually(lambda: any(seen in event["deleted"] for event in recorded(run, "checkpoint")))
            yield

    with training(job(tmp_path, ENDLESS, checkpoint=checkpoint)) as first:
        eventually(lambda: recorded(run, "checkpoint"))
        monkeypatch.setattr("psgd.cluster.preflight.session", slowly)
        with training(job(tmp_path, ENDLESS, checkpoint=checkpoint), resume=True) as second:
            with pytest.raises(RunFailedError, match="taken over"):
                first.result(LIMIT_S)
            stop_after_epochs(run)
            result = second.result(LIMIT_S)
    assert_stopped_exactly(result)
    (_, taken) = recorded(run, "started")
    saved = [event["name"] for event in recorded(run, "checkpoint")]
    before = [name for name in saved if name.endswith("-1")]
    assert taken["resumed"] in before[-2:]  # one may have been committed while the second driver took the run


def test_a_batch_that_kills_its_workers_is_named_or_done_without(tmp_path: Path) -> None:
    model = {"kind": "python", "path": "tests.support.faulty_models:poisoned", "kwargs": {"row": 100}}
    with pytest.raises(RunFailedError, match=r"batch \d+ of shard 0 in epoch 1 was tried 2 times"):
        psgd.train(job(tmp_path, 1, model=model, failure={"poison_tries": 2}), name="fails", progress=False)
    failure = {"poison": "skip", "poison_tries": 2}
    result = psgd.train(job(tmp_path, 1, model=model, failure=failure), name="skips", progress=False)
    assert (result.status, result.ledger.batches, result.ledger.applied) == ("finished", BATCHES, BATCHES - 1)
    (skipped,) = recorded(tmp_path / "skips", "poison_skipped")
    assert skipped["tries"] == 2


def test_a_running_job_is_scaled_up_and_down(tmp_path: Path) -> None:
    run = tmp_path / "run"
    directory = RunDirectory(Storage(str(run)))
    with training(job(tmp_path, ENDLESS)) as under_way:
        eventually(lambda: len(recorded(run, "worker_up")) == 2)
        directory.command("scale", ["3"])
        eventually(lambda: len(recorded(run, "worker_up")) == 3)
        directory.command("scale", ["1"])
        eventually(lambda: len(recorded(run, "worker_stopped")) == 2)
        directory.command("scale", ["none"])
        eventually(lambda: len(recorded(run, "command")) == 3)
        stop_after_epochs(run)
        result = under_way.result(LIMIT_S)
    assert_stopped_exactly(result)
    assert result.failures == {}
    # A worker that leaves finishes its batch first. Only batches that an idle worker took over are computed twice.
    batches = result.ledger.batches
    shared = sum(event["batches"] for event in recorded(run, "taken_over"))
    assert result.ledger.duplicates <= shared
    assert result.goodput >= batches / (batches + shared)
    assert [command["accepted"] for command in recorded(run, "command")] == [True, True, False, True]
