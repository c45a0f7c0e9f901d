from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from psgd.errors import OwnershipError, ResumeError, RunNotFoundError
from psgd.monitoring.rundir import RunDirectory
from psgd.result import LedgerCounts, Result
from psgd.spec import JobSpec
from psgd.storage import Storage


def job(**sections: Any) -> JobSpec:
    plain = {
        "model": {"kind": "linear"},
        "data": {"format": "sklearn", "dataset": "iris"},
        "optimizer": {"lr": 0.1},
        "run": {"epochs": 1},
    }
    return JobSpec.model_validate(plain | sections)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run that has begun."""
    run = RunDirectory(Storage(str(tmp_path / "run")))
    run.begin(job())
    return run


def test_a_run_is_described_as_given_and_with_every_default(run: RunDirectory) -> None:
    given = yaml.safe_load(run.storage.read("spec.yaml"))
    assert (given["run"], "scaling" in given) == ({"epochs": 1}, False)
    assert JobSpec.model_validate_json(run.storage.read("resolved.json")) == job()
    env = json.loads(run.storage.read("env.json"))
    assert {"python", "platform", "packages"} == env.keys()
    assert env["packages"]["psgd"]


def test_a_resumed_run_keeps_its_first_description(run: RunDirectory) -> None:
    before = run.storage.read("resolved.json")
    run.begin(job(run={"epochs": 9}))
    assert run.storage.read("resolved.json") == before


def test_resuming_may_change_everything_but_what_the_weights_depend_on(run: RunDirectory) -> None:
    run.check_identity(job(run={"epochs": 50}, scaling={"workers": 7}, checkpoint={"keep": 1}, name="other"))
    other = job(optimizer={"lr": 0.2}, data={"format": "sklearn", "dataset": "wine"})
    with pytest.raises(ResumeError) as refused:
        run.check_identity(other)
    assert "data.dataset was 'iris' and is 'wine'; optimizer.lr was 0.1 and is 0.2" in str(refused.value)


def test_each_owner_counts_one_more_and_the_one_before_is_told_who_has_it(run: RunDirectory) -> None:
    first = run.own()
    run.check_owner()
    later = RunDirectory(run.storage)
    second = later.own()
    assert (first.incarnation, second.incarnation) == (1, 2)
    later.check_owner()
    with pytest.raises(OwnershipError, match=f"taken over by process {second.pid} on {second.host}"):
        run.check_owner()
    with pytest.raises(OwnershipError):
        RunDirectory(run.storage).check_owner()  # it never owned it


def test_events_and_metrics_are_lines_in_order(run: RunDirectory) -> None:
    run.event("started", incarnation=1)
    run.event("finished", status="stopped", error=None)
    run.metrics({"train/loss": 0.5, "val/loss": None})
    started, finished = run.read_lines("events.jsonl")
    assert (started["event"], started["incarnation"]) == ("started", 1)
    assert (finished["event"], finished["status"], finished["error"]) == ("finished", "stopped", None)
    assert started["time"] <= finished["time"]
    (line,) = run.read_lines("metrics.jsonl")
    assert {name: line[name] for name in ("train/loss", "val/loss")} == {"train/loss": 0.5, "val/loss": None}


def test_a_result_is_read_back_as_it_was(run: RunDirectory) -> None:
    assert run.read_json("result.json") is None
    counts = LedgerCounts(batches=5, applied=5, duplicates=0, requeued=2, discarded=0)
    result = Result("finished", "run", run.storage.url, 1, 5, 150, 0.5, {"val/loss": None}, counts, "000001-1", None)
    run.finish(result)
    assert run.read_json("result.json") == result.to_dict()


@pytest.mark.parametrize("ask", ["read_json", "read_lines", "command"])
def test_a_run_that_is_not_there_is_refused(tmp_path: Path, ask: str) -> None:
    nowhere = RunDirectory(Storage(str(tmp_path / "nowhere")))
    with pytest.raises(RunNotFoundError, match=r"there is no run in .*nowhere"):
        getattr(nowhere, ask)("stop")
    assert not (tmp_path / "nowhere").exists()


def test_commands_are_taken_once_and_in_order(run: RunDirectory) -> None:
    asked = [run.command(kind) for kind in ("stop", "dance")]
    taken = run.take_commands()
    assert [(command["id"], command["command"]) for command in taken] == list(
        zip(asked, ("stop", "dance"), strict=True)
    )
    assert run.take_commands() == []


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[]", b'{"stop": true}'])
def test_what_is_no_command_is_taken_as_an_unknown_one(run: RunDirectory, text: bytes) -> None:
    run.storage.write("commands/odd.json", text)
    assert run.take_commands() == [{"id": "odd", "command": None, "settings": []}]
    assert run.take_commands() == []


def test_a_command_that_is_being_written_waits(run: RunDirectory) -> None:
    run.storage.write("commands/.1.json-unfinished", b"{")
    assert run.take_commands() == []
    assert run.storage.names("commands") == [".1.json-unfinished"]
