from __future__ import annotations

import json
import os
import shlex
import time
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import ANY

import pytest
import yaml

from psgd.errors import (
    DamagedFileError,
    OwnershipError,
    ResumeError,
    RunNotFoundError,
    RunNotRunningError,
    SpecError,
    StorageError,
)
from psgd.jsontext import to_json
from psgd.result import LedgerCounts, Result
from psgd.spec import JobSpec
from psgd.spec.reader import load_spec
from psgd.store.commands import Command, Refusal
from psgd.store.liveness import HEARTBEAT_S
from psgd.store.owner import Owner
from psgd.store.run_directory import RunDirectory
from psgd.store.storage import Storage
from tests.support.run_records import finish, start


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
    """Return the directory of a run that has begun."""
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
        RunDirectory(run.storage).check_owner()  # this object never owned the run


def test_events_and_metrics_are_lines_in_order(run: RunDirectory) -> None:
    start(run)
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


# Commands


def test_commands_are_taken_once_and_in_order(run: RunDirectory) -> None:
    run.own()
    ids = [run.command("stop"), run.command("scale", ["4"])]
    taken = run.take_commands()
    assert [(command.id, command.command) for command in taken if isinstance(command, Command)] == [
        (ids[0], "stop"),
        (ids[1], "scale"),
    ]
    assert run.take_commands() == []
    assert run.storage.names("commands") == []


def test_a_command_for_an_earlier_driver_is_refused_by_the_next(run: RunDirectory) -> None:
    run.own()
    identifier = run.command("stop")
    later = RunDirectory(run.storage)
    later.own()
    (refusal,) = later.take_commands()
    assert refusal == Refusal(identifier, ANY)
    assert isinstance(refusal, Refusal)
    assert "meant for incarnation 1, of an earlier driver; this driver began with incarnation 2" in refusal.reason


def test_a_command_is_for_every_server_that_the_same_driver_starts(run: RunDirectory) -> None:
    run.own()
    run.command("stop")
    run.next_incarnation()
    assert isinstance(run.take_commands()[0], Command)


def test_a_command_for_a_run_that_has_ended_is_refused(run: RunDirectory) -> None:
    run.own()
    start(run)
    finish(run)
    with pytest.raises(
        RunNotRunningError, match=r"psgd stop is for .* has ended. To continue it: psgd train .*--resume"
    ):
        run.command("stop")
    assert run.storage.names("commands") == []


def test_a_command_for_a_run_whose_driver_is_gone_is_refused(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.own()
    start(run)
    monkeypatch.setattr(Owner, "is_alive", False)
    with pytest.raises(
        RunNotRunningError, match=rf"psgd set is for .* was lost: its driver, process {os.getpid()} on .* is gone"
    ):
        run.command("set", ["optimizer.lr=1"])


def test_a_command_with_too_much_text_is_refused_where_it_is_given(run: RunDirectory) -> None:
    run.own()
    with pytest.raises(SpecError, match=r"psgd set: settings\.1: .*4096"):
        run.command("set", ["a=1", "a=" + "x" * 5000])


def refuse_to_list(*arguments: object) -> NoReturn:
    raise PermissionError(13, "Permission denied")


def test_a_folder_of_commands_that_cannot_be_read_is_left_alone_for_a_while(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.own()
    run.command("stop")
    with monkeypatch.context() as patched:
        patched.setattr("psgd.store.storage.take_files", refuse_to_list)
        (refusal,) = run.take_commands()
    assert isinstance(refusal, Refusal)
    assert "Permission denied" in refusal.reason
    assert run.take_commands() == []
    run.event("noticed")  # logging does not wait for the folder
    assert run.read_lines("events.jsonl")[-1]["event"] == "noticed"


def test_that_commands_cannot_be_read_is_told_once_until_they_can(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psgd.store.run_directory.RETRY_S", 0.0)
    run.own()
    run.command("stop")
    for _ in range(2):
        with monkeypatch.context() as patched:
            patched.setattr("psgd.store.storage.take_files", refuse_to_list)
            assert [len(run.take_commands()) for _ in range(3)] == [1, 0, 0]
        run.take_commands()


# Liveness


def test_a_run_that_is_driven_by_a_living_process_runs(run: RunDirectory) -> None:
    run.own()
    assert run.liveness().status == "running"


def test_a_run_has_ended_once_its_log_and_result_say_so_until_it_is_resumed(run: RunDirectory) -> None:
    run.own()
    start(run)
    finish(run)
    assert run.liveness().status == "ended"
    start(run, incarnation=2, resumed="000001-1")
    assert run.liveness().status == "running"


def test_the_last_sign_of_life_is_the_newest_of_all(run: RunDirectory) -> None:
    owner = run.own()
    assert run.liveness().last_sign == owner.started
    run.storage.write("heartbeat", to_json({"time": owner.started + 5}).encode())
    assert run.liveness().last_sign == owner.started + 5
    run.storage.write("metrics.jsonl", to_json({"time": owner.started + 7, "updates": 1}).encode())
    assert run.liveness().last_sign == owner.started + 7


def test_the_heart_beats_only_while_nothing_is_logged(run: RunDirectory) -> None:
    run.event("noticed")
    run.beat(time.monotonic())
    assert run.read_json("heartbeat") is None
    run.beat(time.monotonic() + HEARTBEAT_S)
    assert run.read_json("heartbeat") is not None


def test_the_command_that_resumes_a_run_is_valid_for_it(run: RunDirectory) -> None:
    program, train, file, *options = shlex.split(run.resume_command)
    assert (program, train, options) == (
        "psgd",
        "train",
        ["--name", "run", "--storage", run.storage.url.removesuffix("/run"), "--resume"],
    )
    run.check_identity(load_spec(file))


# Files that are damaged


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"[" * 100_000], ids=["empty", "cut", "list", "null", "deep"]
)
@pytest.mark.parametrize("name", ["resolved.json", "owner", "result.json", "heartbeat", "env.json"])
def test_a_damaged_file_is_one_error_that_names_it(run: RunDirectory, name: str, text: bytes) -> None:
    run.storage.write(name, text)
    with pytest.raises(DamagedFileError, match=rf"{run.storage.url}/{name} is damaged"):
        run.read_json(name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("owner", b'{"driver": "x"}'),
        ("owner", b'{"driver": 1, "incarnation": {}, "host": "", "pid": [], "started": 0, "machine": ""}'),
        ("result.json", b'{"status": "glad"}'),
        ("heartbeat", b'{"time": 1e300}'),
        ("heartbeat", b'{"time": "soon"}'),
    ],
)
def test_a_file_of_another_content_is_damaged(run: RunDirectory, name: str, text: bytes) -> None:
    run.storage.write(name, text)
    with pytest.raises(DamagedFileError, match=rf"/{name} is damaged \(.+\): restore the file"):
        run.read_json(name)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("events.jsonl", b"7"),
        ("events.jsonl", b"[]"),
        ("events.jsonl", b'{"time": 1}'),
        ("events.jsonl", b'{"event": "started"}'),
        ("events.jsonl", b'{"time": 1e300, "event": "started"}'),
        ("events.jsonl", b'{"time": 1, "event": "started"}'),
        ("events.jsonl", b'{"time": 1, "event": "started", "incarnation": [], "resumed": null}'),
        ("events.jsonl", b'{"time": 1, "event": "started", "incarnation": 1, "resumed": "x"}'),
        ("metrics.jsonl", b'{"updates": 1}'),
    ],
)
def test_a_line_of_another_content_is_damaged(run: RunDirectory, name: str, line: bytes) -> None:
    run.event("before")
    run.storage.write(name, b'{"time": 1, "event": "good"}\n' + line + b"\n")
    with pytest.raises(DamagedFileError, match=rf"/{name}, line 2, is damaged"):
        run.read_lines(name)


def test_a_file_that_is_too_large_is_refused(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psgd.store.run_directory.MOST_JSON_BYTES", 100)
    run.storage.write("owner", b" " * 101)
    with pytest.raises(StorageError, match=r"/owner is damaged \(it has more than 100 bytes\): restore"):
        run.read_json("owner")


@pytest.mark.parametrize("text", [b"", b"[]"])
def test_a_run_without_a_readable_job_is_resumed_as_none(run: RunDirectory, text: bytes) -> None:
    run.storage.write("resolved.json", text)
    with pytest.raises(DamagedFileError, match=r"resolved\.json is damaged"):
        run.check_identity(job())
    run.storage.write("resolved.json", b"{}")
    with pytest.raises(SpecError, match=r"resolved\.json is not a valid job"):
        run.check_identity(job())


# Storage that fails


class Flaky(Storage):
    """Storage that refuses every write while `down` is True."""

    down = False

    def _call_filesystem(self, doing: str, call: Any, size: int = 0) -> Any:
        if Flaky.down and not doing.startswith(("read", "list", "look")):
            raise StorageError(f"cannot {doing} in {self.url}: OSError: read-only")
        return super()._call_filesystem(doing, call, size)

    def folder(self, name: str) -> Storage:
        return Flaky(f"{self.url}/{name}")


@pytest.fixture
def flaky(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """Return the directory of a run that has begun, on storage that can be made to fail."""
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
    start(flaky)
    flaky.tolerate_faults(told.append)
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
    flaky.tolerate_faults(lambda fault: None)
    Flaky.down = True
    flaky.event("lost")
    Flaky.down = False
    flaky.event("later")
    assert flaky.read_lines("events.jsonl") == []
    counts = LedgerCounts(batches=5, applied=5, duplicates=0, requeued=2, discarded=0)
    result = Result("unsaved", "run", flaky.storage.url, 1, 5, 150, 0.5, {}, counts, {}, 1.0, None, "read-only")
    flaky.finish(result)  # the last attempt is made in any case
    assert [event["event"] for event in flaky.read_lines("events.jsonl")] == ["lost", "later"]
    assert flaky.read_json("result.json") == result.to_dict()


def test_a_result_that_cannot_be_written_raises_nothing(flaky: RunDirectory) -> None:
    flaky.tolerate_faults(lambda fault: None)
    Flaky.down = True
    counts = LedgerCounts(batches=0, applied=0, duplicates=0, requeued=0, discarded=0)
    flaky.finish(Result("unsaved", "run", flaky.storage.url, 0, 0, 0, 0.0, {}, counts, {}, None, None, "read-only"))


def test_an_incarnation_that_could_not_be_noted_is_noted_before_a_commit(flaky: RunDirectory) -> None:
    flaky.tolerate_faults(lambda fault: None)
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


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"driver": "x"}', b"[" * 100_000])
def test_an_owner_that_is_damaged_is_told(run: RunDirectory, text: bytes) -> None:
    run.own()
    run.storage.write("owner", text)
    with pytest.raises(StorageError, match="owner is damaged"):
        run.check_owner()
    with pytest.raises(StorageError, match="owner is damaged"):
        RunDirectory(run.storage).own()


def test_an_owner_that_is_gone_is_a_fault_of_the_storage(run: RunDirectory) -> None:
    run.own()
    run.storage.delete("owner")
    with pytest.raises(StorageError, match="cannot read 'owner'"):
        run.check_owner()


def test_a_line_that_a_crash_cut_short_is_left_out(run: RunDirectory) -> None:
    start(run)
    run.storage.append("events.jsonl", b'{"time": 1, "eve')
    run.storage.append("events.jsonl", b"\n\xff\n")
    run.event("finished")
    assert [event["event"] for event in run.read_lines("events.jsonl")] == ["started", "finished"]
