from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from psgd.errors import OwnershipError, ResumeError, RunNotFoundError, StorageError
from psgd.result import LedgerCounts, Result
from psgd.spec import JobSpec
from psgd.store.run_directory import RunDirectory
from psgd.store.storage import Storage


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


def test_a_resumed_run_says_where_its_data_lies_now(tmp_path: Path) -> None:
    run = RunDirectory(Storage(str(tmp_path / "run")))
    data = {"format": "csv", "path": "before.csv"}
    run.begin(job(data=data, run={"epochs": 3}))
    moved = job(data=data | {"path": "after.csv"}, run={"epochs": 9})
    run.check_identity(moved)
    run.begin(moved)
    expected = job(data=data | {"path": "after.csv"}, run={"epochs": 3})
    assert JobSpec.model_validate_json(run.storage.read("resolved.json")) == expected


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
    metrics: dict[str, float | None] = {"val/loss": None}
    result = Result("finished", "run", run.storage.url, 1, 5, 150, 0.5, metrics, counts, {}, 1.0, "000001-1", None)
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


# Storage that fails


class Flaky(Storage):
    """Takes nothing while it is down."""

    down = False

    def _ask(self, doing: str, call: Any, size: int = 0) -> Any:
        if Flaky.down and not doing.startswith(("read", "list", "look")):
            raise StorageError(f"cannot {doing} in {self.url}: OSError: read-only")
        return super()._ask(doing, call, size)

    def folder(self, name: str) -> Storage:
        return Flaky(f"{self.url}/{name}")


@pytest.fixture
def flaky(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """A run that has begun, on storage that can be turned off."""
    monkeypatch.setattr(Flaky, "down", False)
    monkeypatch.setattr("psgd.store.event_log.Storage", Flaky)
    monkeypatch.setattr("psgd.store.event_log.RETRY_S", 0.0)
    run = RunDirectory(Flaky(str(tmp_path / "run")))
    run.begin(job())
    run.own()
    return run


def test_at_the_start_storage_that_fails_refuses_the_run(flaky: RunDirectory) -> None:
    Flaky.down = True
    with pytest.raises(StorageError, match=r"cannot write 'events\.jsonl'.*read-only"):
        flaky.event("started")
    with pytest.raises(StorageError):
        flaky.own()


def test_while_training_what_cannot_be_written_waits_and_is_told_once(flaky: RunDirectory) -> None:
    told: list[str] = []
    flaky.event("started")
    flaky.bear_faults(told.append)
    Flaky.down = True
    for number in range(3):
        flaky.event("lost", number=number)
        flaky.metrics({"train/loss": float(number)})
    (fault,) = told
    assert "events.jsonl" in fault
    assert "Training goes on" in fault
    Flaky.down = False
    flaky.event("back")
    events = flaky.read_lines("events.jsonl")
    assert [event["event"] for event in events] == ["started", "lost", "lost", "lost", "back"]
    assert [event.get("number") for event in events[1:4]] == [0, 1, 2]
    assert len(flaky.read_lines("metrics.jsonl")) == 3


def test_storage_that_failed_a_moment_ago_is_left_alone(flaky: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psgd.store.event_log.RETRY_S", 1e9)
    flaky.bear_faults(lambda fault: None)
    Flaky.down = True
    flaky.event("lost")
    Flaky.down = False
    flaky.event("later")
    assert flaky.read_lines("events.jsonl") == []
    counts = LedgerCounts(batches=5, applied=5, duplicates=0, requeued=2, discarded=0)
    result = Result("unsaved", "run", flaky.storage.url, 1, 5, 150, 0.5, {}, counts, {}, 1.0, None, "read-only")
    flaky.finish(result)  # there is no later
    assert [event["event"] for event in flaky.read_lines("events.jsonl")] == ["lost", "later"]
    assert flaky.read_json("result.json") == result.to_dict()


def test_a_result_that_cannot_be_written_raises_nothing(flaky: RunDirectory) -> None:
    flaky.bear_faults(lambda fault: None)
    Flaky.down = True
    counts = LedgerCounts(batches=0, applied=0, duplicates=0, requeued=0, discarded=0)
    flaky.finish(Result("unsaved", "run", flaky.storage.url, 0, 0, 0, 0.0, {}, counts, {}, None, None, "read-only"))


def test_a_command_that_cannot_be_deleted_is_taken_once(flaky: RunDirectory) -> None:
    flaky.bear_faults(lambda fault: None)
    flaky.command("stop")
    Flaky.down = True
    assert [command["command"] for command in flaky.take_commands()] == ["stop"]
    assert flaky.take_commands() == []
    Flaky.down = False
    flaky.command("scale")
    assert [command["command"] for command in flaky.take_commands()] == ["scale"]
    assert flaky.storage.names("commands") == []


def test_an_incarnation_that_could_not_be_noted_is_noted_before_a_commit(flaky: RunDirectory) -> None:
    flaky.bear_faults(lambda fault: None)
    Flaky.down = True
    assert flaky.next_incarnation() == 2
    assert json.loads(flaky.storage.read("owner"))["incarnation"] == 1
    with pytest.raises(StorageError):
        flaky.check_owner()
    Flaky.down = False
    flaky.check_owner()
    assert json.loads(flaky.storage.read("owner"))["incarnation"] == 2


def test_a_run_taken_over_is_not_ours_any_more(run: RunDirectory) -> None:
    run.own()
    assert run.is_ours
    RunDirectory(run.storage).own()
    with pytest.raises(OwnershipError):
        run.check_owner()
    assert not run.is_ours


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"driver": "x"}'])
def test_an_owner_that_is_damaged_is_told(run: RunDirectory, text: bytes) -> None:
    run.storage.write("owner", text)
    with pytest.raises(StorageError, match="owner is damaged"):
        run.own()


def test_a_line_that_a_crash_cut_short_is_left_out(run: RunDirectory) -> None:
    run.event("started")
    run.storage.append("events.jsonl", b'{"time": 1, "eve')
    run.storage.append("events.jsonl", b"\n\xff\n")
    run.event("finished")
    assert [event["event"] for event in run.read_lines("events.jsonl")] == ["started", "finished"]
