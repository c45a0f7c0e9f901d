from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from psgd.store.commands import Command
from psgd.store.owner import Owner
from psgd.store.run_directory import RunDirectory
from tests.support.run_records import finish, result_of, start


def commands(run: RunDirectory) -> list[tuple[str, list[str]]]:
    """Return the commands that the driver of the run finds."""
    taken = run.take_commands()
    assert all(isinstance(command, Command) for command in taken)
    return [(command.command, command.settings) for command in taken if isinstance(command, Command)]


def test_status_of_a_run_under_way_is_its_owner_and_newest_metrics(psgd: Any, run: RunDirectory) -> None:
    assert json.loads(psgd("status", "iris")[1])["metrics"] is None
    run.metrics({"updates": 1})
    run.metrics({"updates": 2})
    code, out, _ = psgd("status", "iris")
    told = json.loads(out)
    assert (code, told["status"], told["owner"]["incarnation"]) == (0, "running", 1)
    assert [line["updates"] for line in told["metrics"]] == [2]


def test_status_of_an_ended_run_is_its_result_until_it_is_resumed(psgd: Any, run: RunDirectory) -> None:
    result = finish(run, "stopped")
    assert json.loads(psgd("status", "iris")[1]) == result.to_dict()
    start(run, incarnation=2, resumed="000001-1")
    assert json.loads(psgd("status", "iris")[1])["status"] == "running"


def test_logs_are_the_events_without_what_is_none(psgd: Any, run: RunDirectory) -> None:
    code, out, err = psgd("logs", "iris")
    assert (code, err) == (0, "")
    assert out.split()[2:] == ["started", "incarnation=1"]


def test_stop_leaves_a_command_for_the_driver(psgd: Any, run: RunDirectory) -> None:
    code, out, _ = psgd("stop", "iris", "--storage", "runs")
    assert code == 0
    assert "asked iris to stop" in out
    assert commands(run) == [("stop", [])]


def test_set_leaves_the_settings_for_the_driver(psgd: Any, run: RunDirectory) -> None:
    code, out, _ = psgd("set", "iris", "consistency.mode=bsp", "optimizer.lr=0.5")
    assert code == 0
    assert "asked iris to set consistency.mode=bsp optimizer.lr=0.5" in out
    assert commands(run) == [("set", ["consistency.mode=bsp", "optimizer.lr=0.5"])]


def test_scale_takes_the_number_of_workers_after_the_name(psgd: Any, run: RunDirectory) -> None:
    code, out, _ = psgd("scale", "iris", "4")
    assert code == 0
    assert "asked iris to use 4 workers; `psgd logs iris` shows" in out
    assert commands(run) == [("scale", ["4"])]


@pytest.mark.parametrize(
    ("words", "follow"),
    [
        (["stop", "iris"], "psgd status iris"),
        (["set", "iris", "optimizer.lr=5"], "psgd logs iris"),
        (["scale", "iris", "1"], "psgd logs iris"),
    ],
)
def test_the_command_that_shows_the_effect_looks_in_the_same_storage(
    psgd: Any, run: RunDirectory, words: list[str], follow: str
) -> None:
    folder = run.storage.url.rpartition("/")[0]
    assert f"; `{follow} --storage {folder}` shows" in psgd(*words, "--storage", folder)[1]
    assert f"; `{follow}` shows" in psgd(*words)[1]


def test_after_a_stop_on_a_cluster_the_status_is_that_of_the_cluster(
    psgd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(
        "psgd.cluster.jobs.Jobs", lambda address: SimpleNamespace(stop=lambda run: asked.append((address, run)))
    )
    url = "http://head:8265"
    code, out, _ = psgd("stop", "iris", "--address", url)
    assert (code, asked) == (0, [(url, "iris")])
    assert out == f"asked iris to stop; `psgd status iris --address {url}` shows when it has stopped\n"


COMMANDS = [["stop", "iris"], ["set", "iris", "optimizer.lr=5"], ["scale", "iris", "4"]]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: words[0])
def test_a_command_for_a_run_that_has_ended_is_refused_with_exit_2(
    psgd: Any, run: RunDirectory, command: list[str]
) -> None:
    finish(run)
    code, out, err = psgd(*command)
    assert (code, out) == (2, "")
    assert f"psgd {command[0]} is for a run that trains, but the run in {run.storage.url} has ended" in err
    assert "--resume" in err
    assert run.take_commands() == []


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: words[0])
def test_a_command_for_a_run_that_was_lost_is_refused_with_exit_2(
    psgd: Any, run: RunDirectory, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setattr(Owner, "is_alive", False)
    code, out, err = psgd(*command)
    assert (code, out) == (2, "")
    assert "was lost: its driver, process" in err


def test_status_of_a_run_whose_driver_is_gone_is_lost(
    psgd: Any, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.metrics({"updates": 2})
    monkeypatch.setattr(Owner, "is_alive", False)
    code, out, _ = psgd("status", "iris")
    told = json.loads(out)
    assert (code, told["status"]) == (0, "lost")
    assert told["reason"].endswith(" is gone")
    assert 0 <= told["last_sign_s"] < 60
    assert told["resume"] == (
        f"psgd train {run.storage.url}/spec.yaml --name iris --storage {Path('runs').absolute()} --resume"
    )
    assert told["metrics"][0]["updates"] == 2


def test_what_is_not_finite_is_null_in_every_output(psgd: Any, run: RunDirectory) -> None:
    run.metrics({"train/loss": float("inf"), "val/loss": float("nan")})
    line = parsed(psgd("status", "iris")[1])["metrics"][0]
    assert (line["train/loss"], line["val/loss"]) == (None, None)
    run.event("finished", status="failed", error=None)
    run.finish(result_of(run, **{"train/loss": float("inf")}))
    assert parsed(psgd("status", "iris")[1])["metrics"] == {"train/loss": None}
    assert b"Infinity" not in run.storage.read("result.json") + run.storage.read("metrics.jsonl")


def parsed(text: str) -> Any:
    """Parse JSON strictly: Infinity and NaN, which Python accepts, are errors."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("name", ["resolved.json", "owner", "result.json", "events.jsonl", "metrics.jsonl"])
@pytest.mark.parametrize("text", [b"", b"{", b"[]"], ids=["empty", "cut", "other"])
def test_a_damaged_file_of_a_run_ends_no_command_with_a_traceback(
    psgd: Any, run: RunDirectory, name: str, text: bytes
) -> None:
    finish(run)
    run.storage.write(name, text)
    lines = name.endswith("l")
    told = []
    for command in (["status"], ["logs"], ["stop"], ["scale"], ["set"], ["replay"]):
        code, _, err = psgd(command[0], "iris", *{"scale": ["4"], "set": ["optimizer.lr=1"]}.get(command[0], []))
        assert code in (0, 2, 3)
        told.append(f"{run.storage.url}/{name}" in err and " is damaged (" in err)
    assert any(told) or (lines and text != b"[]")  # a line that a crash cut short is left out


def test_logs_print_no_character_that_a_terminal_acts_on(psgd: Any, run: RunDirectory) -> None:
    run.event("worker_lost", error="\x1b[2Jgone\r\nand [/b]more")
    assert psgd("logs", "iris")[1].splitlines()[1].endswith(r"error=\x1b[2Jgone\r\nand [/b]more")


@pytest.mark.parametrize(
    "command", [["status"], ["logs"], ["stop"], ["replay"], ["set"], ["scale"]], ids=lambda words: words[0]
)
def test_a_run_that_is_not_there_is_refused_with_exit_2(psgd: Any, command: list[str]) -> None:
    settings = {"set": ["optimizer.lr=1"], "scale": ["4"]}.get(command[0], [])
    code, out, err = psgd(*command, "nowhere", *settings)
    assert (code, out) == (2, "")
    assert err.startswith("psgd: there is no run in ")


# Texts of foreign origin


def test_logs_print_no_control_characters(psgd: Any, run: RunDirectory) -> None:
    run.event("\x1b[2J", fault="\x1b]0;owned\x07\r\n\x9b31m\u202e", **{"\x1bkey": 1})
    code, out, _ = psgd("logs", "iris")
    assert code == 0
    assert "\\x1b[2J" in out
    assert all(character.isprintable() or character == "\n" for character in out)
    assert out.count("\n") == len(run.read_lines("events.jsonl"))


def test_an_error_prints_no_control_characters(psgd: Any, run: RunDirectory) -> None:
    run.storage.append("events.jsonl", b'{"time": 1, "event": "\\u001b[2J", "partition": "\\u001b"}\n')
    run.storage.append("events.jsonl", b'{"time": 1, "event": "started\\u001b[2J", "resumed": "\\u001b[2J"}\n')
    code, _, err = psgd("logs", "iris")
    assert code == 2
    assert "\x1b" not in err


def test_passwords_of_urls_are_shown_and_recorded_nowhere(psgd: Any, run: RunDirectory) -> None:
    url = "s3://me:secret@bucket/x?token=secret"
    run.event("save_failed", cause=f"cannot write {url}")
    run.metrics({f"{url}": 1.0})
    assert "secret" not in psgd("status", "iris")[1]
    run.event("finished", status="failed", error=url)
    run.finish(replace(result_of(run, "failed"), path=url, error=url))
    for command in ("status", "logs"):
        assert "secret" not in "".join(map(str, psgd(command, "iris")))
    for name in ("events.jsonl", "metrics.jsonl", "result.json", "owner"):
        assert b"secret" not in run.storage.read(name)
    code, _, err = psgd("status", "iris", "--storage", "nosuch://me:secret@host/runs?key=secret")
    assert (code, "secret" in err, "nosuch://***@host/runs" in err) == (2, False, True)


DAMAGES = {"empty": b"", "deep": b"[" * 100_000, "list": b"[]", "binary": b"\xff\x00", "number": b"9" * 5_000}


@pytest.mark.parametrize("text", DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize(
    "name", ["resolved.json", "owner", "result.json", "heartbeat", "events.jsonl", "metrics.jsonl"]
)
def test_a_damaged_file_is_one_sentence_and_no_traceback(psgd: Any, run: RunDirectory, name: str, text: bytes) -> None:
    finish(run)
    run.storage.write(name, text)
    for command in (["status"], ["logs"], ["stop"], ["set", "optimizer.lr=1"], ["scale", "2"], ["replay"]):
        code, _, err = psgd(command[0], "iris", *command[1:])
        assert code in (0, 2), (command, err)
        assert err.count("\n") <= 1 or "is not a valid job" in err, (command, err)
        assert "Traceback" not in err
