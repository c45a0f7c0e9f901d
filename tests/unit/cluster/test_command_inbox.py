"""Commands for a supervisor that trains: no entry of `commands/` ends the run."""

from __future__ import annotations

import os
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from psgd.cluster import command_inbox
from psgd.cluster.command_inbox import CommandInbox
from psgd.cluster.supervisor import Supervisor
from psgd.core.driver.events import Action, Change, Event, Finish, Scale, Started, Stop, Tick
from psgd.jsontext import to_json
from psgd.spec import JobSpec
from psgd.store.commands import MOST_TAKEN
from psgd.store.run_directory import RunDirectory
from psgd.store.storage import Storage
from tests.support.jobs import job

STOPPED = Finish("stopped")


class Coordinator:
    """A coordinator that only ends the run when it gets a `Stop`.

    Attributes:
        events: the events that it got, in order, except ticks and the start.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []

    def handle(self, event: Event, now: float) -> list[Action]:
        if not isinstance(event, Tick | Started):
            self.events.append(event)
        return [STOPPED] if isinstance(event, Stop) else []

    def next_deadline(self) -> None:
        """Return no deadline."""

    def status(self, now: float) -> Any:
        """Return nothing: no test in this module looks at the status."""


@pytest.fixture
def spec() -> JobSpec:
    return job(data={"format": "sklearn", "dataset": "iris", "batch_size": 10})


@pytest.fixture
def run(tmp_path: Path, spec: JobSpec, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """Return the directory of a run that this process owns."""
    monkeypatch.setattr(command_inbox, "POLL_S", 0.0)
    run = RunDirectory(Storage(str(tmp_path / "run")))
    run.own()
    run.begin(spec)
    (tmp_path / "run" / "commands").mkdir()
    return run


def drive(run: RunDirectory, spec: JobSpec, interrupted: bool = False) -> list[Event]:
    """Run a supervisor until its run is stopped. Return the events that its coordinator got."""
    coordinator: Any = Coordinator()
    inputs: Any = SimpleNamespace(context=SimpleNamespace(spec=spec, partitions=()))
    checkpoint_writer: Any = None
    driver = Supervisor(
        coordinator, inputs, run, checkpoint_writer, lambda *_: None, lambda _: None, lambda: interrupted
    )
    assert driver.train() == STOPPED
    events: list[Event] = coordinator.events
    return events


def answers(run: RunDirectory) -> list[dict[str, Any]]:
    """Return the driver's answers to commands, in order."""
    return [line for line in run.read_lines("events.jsonl") if line["event"] == "command"]


def test_commands_are_followed_in_order_and_recorded(run: RunDirectory, spec: JobSpec) -> None:
    ids = [run.command("set", ["optimizer.lr=0.5"]), run.command("scale", ["3"]), run.command("stop")]
    change, scale, stop = drive(run, spec)
    assert isinstance(change, Change)
    assert (change.settings.optimizer.lr, scale, stop) == (0.5, Scale(3), Stop("stopped"))
    assert [(answer["id"], answer["accepted"]) for answer in answers(run)] == [(name, True) for name in ids]


@pytest.mark.parametrize(
    "setting",
    [
        "optimizer.lr=2001-99-99",
        "optimizer.lr=!!float abc",
        "optimizer.lr=!!bool 7",
        "optimizer.lr=" + "[" * 4000,
        "optimizer.lr=" + "9" * 4000,
        "optimizer={7: 1}",
        "7=1",
        "optimizer.lr=&a [*a]",
        "optimizer.lr=-1",
        "data.batch_size=3",
        "",
        "=",
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_and_the_run_goes_on(
    run: RunDirectory, spec: JobSpec, setting: str
) -> None:
    run.command("set", [setting])
    run.command("stop")
    assert drive(run, spec) == [Stop("stopped")]
    refused, stopped = answers(run)
    assert (refused["accepted"], refused["settings"], stopped["accepted"]) == (False, [setting], True)
    assert 0 < len(refused["reason"]) <= 500


def foreign(run: RunDirectory, name: str, kind: str, settings: list[str]) -> None:
    """Write a command that `psgd` itself would not write, because a setting is too long."""
    command = {"id": name, "incarnation": run.incarnation, "command": kind, "settings": settings}
    run.storage.write(f"commands/{name}.json", to_json(command).encode())


NESTED = ", ".join(f"&{name} [{', '.join([f'*{below}'] * 9)}]" for below, name in pairwise("abcdefg"))  # 9**6 values


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        ("set", "optimizer.lr=" + "[" * 5_000),
        ("set", "optimizer.lr=" + "1" * 40_000 + "x"),
        ("set", "optimizer.lr=" + "1" * 4_000 + "x"),
        ("set", "optimizer.lr=1" + "_" * 4_000 + "x"),
        ("set", "optimizer.lr=" + "1:" * 2_000),
        ("set", f"optimizer.lr=[&a x, {NESTED}]"),
        ("set", "optimizer.lr={<<: [" + "{a: 1}, " * 500 + "]}"),
        ("set", "." * 4_000 + "=1"),
        ("scale", "9" * 5_000),
        ("scale", "１２"),
    ],
    ids=lambda text: text[:24],
)
def test_a_command_that_would_take_long_is_refused_at_once(
    run: RunDirectory, spec: JobSpec, kind: str, setting: str
) -> None:
    foreign(run, "1", kind, [setting])
    foreign(run, "2", "stop", [])
    began = time.process_time()
    inbox = CommandInbox(run, spec)
    assert inbox.poll(0.0) == [Stop("stopped")]
    assert time.process_time() - began < 1  # it takes a few milliseconds; backtracking would take minutes
    refused, _ = answers(run)
    assert not refused["accepted"]
    assert 0 < len(refused["reason"]) <= 500


def test_each_look_at_a_flood_of_files_is_bounded(run: RunDirectory, spec: JobSpec, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "commands"
    for number in range(1_500):
        (folder / f"{number:05d}").touch()
    inbox = CommandInbox(run, spec)
    for looks in range(1, 4):
        assert inbox.poll(float(looks)) == []
        assert len(answers(run)) == looks * MOST_TAKEN
        assert len(list(folder.iterdir())) == 1_500 - looks * MOST_TAKEN


def test_a_command_with_a_password_is_recorded_without_it(run: RunDirectory, spec: JobSpec) -> None:
    run.command("set", ["data.path=s3://user:secret@bucket/x?token=secret"])
    run.command("stop")
    drive(run, spec)
    assert answers(run)[0]["settings"] == ["data.path=s3://***@bucket/x?token=***"]
    assert b"secret" not in run.storage.read("events.jsonl")


@pytest.mark.parametrize("workers", [[], ["²"], ["9" * 4000], ["-1"], ["none"], ["1", "2"]])
def test_a_number_of_workers_that_makes_no_sense_is_refused_and_the_run_goes_on(
    run: RunDirectory, spec: JobSpec, workers: list[str]
) -> None:
    run.command("scale", workers)
    run.command("stop")
    events = drive(run, spec)
    assert events[-1] == Stop("stopped")
    assert answers(run)[0]["accepted"] == (workers == ["1", "2"])  # arguments after the number are ignored


def test_whatever_lies_in_the_folder_is_refused_with_a_reason_and_the_run_goes_on(
    run: RunDirectory, spec: JobSpec, tmp_path: Path
) -> None:
    folder = tmp_path / "run" / "commands"
    (folder / "directory.json").mkdir()
    (folder / "device.json").symlink_to("/dev/zero")
    (folder / "dangling.json").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.json")
    (folder / "deep.json").write_bytes(b"[" * 60_000)
    (folder / "deeper.json").write_bytes(b"[" * 200_000)
    (folder / "empty.json").touch()
    (folder / "notes.txt").write_text("buy milk")
    (folder / "odd.json").write_text(to_json({"id": "odd", "incarnation": 1, "command": "set", "settings": {"a": 1}}))
    with (folder / "huge.json").open("wb") as file:
        file.truncate(2**40)
    run.command("stop")
    assert drive(run, spec) == [Stop("stopped")]
    told = {answer["id"]: answer.get("reason") for answer in answers(run) if not answer["accepted"]}
    assert told.keys() == {
        "directory",
        "device",
        "dangling",
        "pipe",
        "deep",
        "deeper",
        "empty",
        "notes.txt",
        "odd",
        "huge",
    }
    assert all(told.values())
    assert list(folder.iterdir()) == []


def test_a_fault_in_understanding_a_command_does_not_end_the_run(
    run: RunDirectory, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RecursionError("too deep")

    monkeypatch.setattr(command_inbox, "change_settings", fail)
    run.command("set", ["optimizer.lr=1"])
    run.command("stop")
    assert drive(run, spec) == [Stop("stopped")]
    assert answers(run)[0]["reason"] == "RecursionError: too deep"


def test_what_an_earlier_driver_left_is_not_followed(run: RunDirectory, spec: JobSpec) -> None:
    run.command("stop")
    later = RunDirectory(run.storage)
    later.own()
    later.command("set", ["optimizer.lr=0.5"])
    later.command("stop")
    assert [type(event) for event in drive(later, spec)] == [Change, Stop]
    assert [answer["accepted"] for answer in answers(later)] == [False, True, True]


def test_a_folder_of_commands_that_is_a_link_is_refused_and_left_alone(
    run: RunDirectory, spec: JobSpec, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "1.json").write_text("kept")
    (tmp_path / "run" / "commands").rmdir()
    (tmp_path / "run" / "commands").symlink_to(foreign)
    assert drive(run, spec, interrupted=True) == [Stop("interrupted")]
    (refused,) = answers(run)
    assert "NotADirectoryError" in refused["reason"]
    assert (foreign / "1.json").read_text() == "kept"


def test_a_driver_that_has_nothing_to_log_gives_signs_of_life(run: RunDirectory, spec: JobSpec) -> None:
    assert run.read_json("heartbeat") is None
    drive(run, spec, interrupted=True)
    assert run.read_json("heartbeat") is not None


def test_an_interruption_stops_the_run_once(run: RunDirectory, spec: JobSpec) -> None:
    assert drive(run, spec, interrupted=True) == [Stop("interrupted")]
