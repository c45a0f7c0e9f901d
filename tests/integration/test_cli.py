"""Runs on a local Ray through the command line: output, exit codes, files and processes afterwards."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest

from tests.support.command_line import DIGITS, LIMIT_S, CommandLine, eventually, recorded

BATCHES = 90  # in an epoch
EXAMPLES = 1438  # in an epoch
ENDLESS = 100_000  # epochs of a run that is disturbed while it trains, so that it cannot end first
KEYS = [
    *("status", "name", "path", "epochs", "updates", "samples", "duration_s"),
    *("metrics", "ledger", "failures", "goodput", "checkpoint", "error"),
]
METRICS = {
    *("train/loss", "train/epoch", "val/loss", "val/accuracy", "val/epoch", "perf/updates_per_s", "perf/samples_per_s"),
    *("perf/bytes_per_push", "perf/compiled", "compression/residual_norm"),
    *(f"async/staleness_{name}" for name in ("mean", "p50", "p95", "max")),
}


@pytest.fixture
def psgd(tmp_path: Path, ray_home: Path, environment: dict[str, str]) -> CommandLine:
    """Return the command line with a Ray folder of its own, by which its processes are found."""
    return CommandLine(environment | {"RAY_TMPDIR": mkdtemp(dir=ray_home), "RAY_AUTH_MODE": "disabled"}, tmp_path)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, ray_home: Path, environment: dict[str, str]
) -> Iterator[tuple[CommandLine, CompletedProcess[str]]]:
    """Yield the command line and the output of a short run with `--json` and Ray's token authentication."""
    psgd = CommandLine(environment | {"RAY_AUTH_MODE": "token"}, tmp_path_factory.mktemp("finished"))
    done = psgd.run("train", DIGITS, "--set", "run.epochs=3", "--json")
    assert done.returncode == 0, done.stderr
    yield psgd, done
    assert (ray_home / ".ray" / "auth_token").exists()  # authentication was on, with a token of this test


def train(epochs: int, *options: str) -> tuple[str, ...]:
    """Return the arguments of `psgd train` on digits."""
    return ("train", DIGITS, "--set", f"run.epochs={epochs}", *options)


def end_exactly(psgd: CommandLine, *options: str) -> None:
    """Resume the run for two more epochs, and check that every batch of all its epochs was applied once."""
    saved: int = recorded(psgd.folder / "runs" / "digits", "checkpoint")[-1]["epochs"]
    epochs = saved + 2
    done = psgd.run(*train(epochs, "--resume", "--json", *options))
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    assert (result["status"], result["epochs"], result["samples"]) == ("finished", epochs, epochs * EXAMPLES)
    assert result["ledger"]["batches"] == result["ledger"]["applied"] == epochs * BATCHES


def test_train_prints_one_json_document_and_nothing_else(finished: tuple[CommandLine, CompletedProcess[str]]) -> None:
    result = json.loads(finished[1].stdout)
    assert list(result) == KEYS
    assert result["metrics"].keys() == METRICS
    assert list(result["ledger"]) == ["batches", "applied", "duplicates", "requeued", "discarded"]
    assert (result["status"], result["epochs"], result["error"]) == ("finished", 3, None)
    assert Path(result["path"]) == finished[0].folder / "runs" / "digits"
    assert (Path(result["path"]) / "checkpoints" / result["checkpoint"] / "COMMITTED").exists()


def test_progress_and_the_summary_go_to_stderr(finished: tuple[CommandLine, CompletedProcess[str]]) -> None:
    stderr = finished[1].stderr
    assert [line.split("  ")[0] for line in stderr.splitlines() if line.startswith("epoch ")] == [
        f"epoch {epoch}/3" for epoch in (1, 2, 3)
    ]
    assert "finished digits: 3 epochs, 270 updates" in stderr
    assert "--resume" not in stderr


def test_nothing_outlives_a_run(finished: tuple[CommandLine, CompletedProcess[str]]) -> None:
    eventually(lambda: not finished[0].processes())


def test_a_finished_run_is_told_by_status_and_logs(finished: tuple[CommandLine, CompletedProcess[str]]) -> None:
    psgd, done = finished
    assert json.loads(psgd.run("status", "digits").stdout) == json.loads(done.stdout)
    kinds = [line.split()[2] for line in psgd.run("logs", "digits").stdout.splitlines()]
    assert (kinds[0], kinds[-1]) == ("started", "finished")
    assert {"worker_up", "evaluated", "checkpoint"} <= set(kinds)


def test_a_second_run_of_the_name_is_refused_as_json(finished: tuple[CommandLine, CompletedProcess[str]]) -> None:
    again = finished[0].run("train", DIGITS, "--json")
    assert again.returncode == 2
    document = json.loads(again.stdout)
    assert document["status"] == "refused"
    assert "--resume continues it" in document["error"]
    assert "--resume continues it" in again.stderr


def interrupt(psgd: CommandLine, mode: str, send: Callable[[int, int], None], number: int) -> None:
    """Start or resume the run, send a signal after an epoch, and check that the run is saved and no process is left."""
    run = psgd.folder / "runs" / "digits"
    seen = len(recorded(run, "evaluated"))
    with psgd.started(*train(ENDLESS, "--resume"), RAY_AUTH_MODE=mode) as driver:
        eventually(lambda: len(recorded(run, "evaluated")) > seen)
        send(driver.pid, number)
        stderr = driver.communicate(timeout=LIMIT_S)[1]
    assert driver.returncode == 130, stderr
    assert "psgd: interrupted: the run is saved and ended." in stderr
    assert "the same command with --resume continues it" in stderr
    result = json.loads((run / "result.json").read_text())
    assert (result["status"], result["ledger"]["batches"]) == ("interrupted", result["ledger"]["applied"])
    assert recorded(run, "checkpoint")[-1]["updates"] == result["updates"] > 0
    assert (run / "checkpoints" / result["checkpoint"] / "COMMITTED").exists()
    eventually(lambda: not psgd.processes())


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.chaos)])
def test_every_signal_that_ends_a_run_saves_it_and_resuming_ends_it_exactly(
    psgd: CommandLine, number: signal.Signals
) -> None:
    interrupt(psgd, "token", os.killpg, signal.SIGINT)  # to the whole process group, as a terminal does
    interrupt(psgd, "disabled", os.kill, number)
    end_exactly(psgd)
    started = recorded(psgd.folder / "runs" / "digits", "started")
    assert [event["resumed"] is None for event in started] == [True, False, False]


AT_FORK = """
import os, signal, sys

def interrupt():
    if not sent:
        sent.append(True)
        os.kill(os.getpid(), signal.{number})

sent = []
if "psgd.cli" in sys.orig_argv:
    os.register_at_fork(before=interrupt)
"""


@pytest.mark.parametrize(
    "number", ["SIGINT", *(pytest.param(name, marks=pytest.mark.chaos) for name in ("SIGTERM", "SIGHUP"))]
)
def test_a_signal_while_ray_forks_its_processes_ends_the_command_and_leaves_nothing(
    psgd: CommandLine, number: str
) -> None:
    (psgd.folder / "sitecustomize.py").write_text(AT_FORK.format(number=number))
    path = os.pathsep.join([str(psgd.folder), psgd.environment.get("PYTHONPATH", "")])
    done = psgd.run(*train(ENDLESS), PYTHONPATH=path)
    assert done.returncode == 130, done.stderr
    assert done.stderr.startswith("psgd: interrupted: Ray is stopped as soon as it has started")
    assert len(done.stderr.splitlines()) == 1
    assert not (psgd.folder / "runs" / "digits").exists()
    eventually(lambda: not psgd.processes())


def test_stop_ends_a_run_from_another_process(psgd: CommandLine) -> None:
    run = psgd.folder / "runs" / "digits"
    with psgd.started(*train(ENDLESS, "--json")) as driver:
        eventually(lambda: recorded(run, "evaluated"))
        running = json.loads(psgd.run("status", "digits").stdout)
        assert psgd.run("stop", "digits").returncode == 0
        out, stderr = driver.communicate(timeout=LIMIT_S)
    assert (running["status"], running["owner"]["pid"]) == ("running", driver.pid)
    assert driver.returncode == 0, stderr
    assert json.loads(out)["status"] == "stopped"
    assert "the same command with --resume continues it" in stderr
    assert [event["accepted"] for event in recorded(run, "command")] == [True]
    assert json.loads(psgd.run("status", "digits").stdout) == json.loads(out)
    eventually(lambda: not psgd.processes())


def test_a_killed_driver_takes_its_ray_along_and_resuming_ends_exactly(psgd: CommandLine) -> None:
    run = psgd.folder / "runs" / "digits"
    with psgd.started(*train(ENDLESS, "--set", "checkpoint.every_updates=200")) as driver:
        eventually(lambda: recorded(run, "checkpoint"))
        assert any("raylet" in command for command in psgd.processes())
        driver.kill()
    eventually(lambda: not psgd.processes())
    assert recorded(run, "finished") == []
    lost = json.loads(psgd.run("status", "digits").stdout)
    assert (lost["status"], lost["owner"]["pid"]) == ("lost", driver.pid)
    assert "--resume" in lost["resume"]
    refused = psgd.run("stop", "digits")
    assert refused.returncode == 2
    assert lost["resume"] in refused.stderr
    end_exactly(psgd)
    assert recorded(run, "started")[-1]["resumed"] is not None


@pytest.mark.chaos
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", ["async", "bsp"])
def test_ten_drivers_killed_at_random_moments_leave_an_exact_run_that_can_be_replayed(
    psgd: CommandLine, mode: str
) -> None:
    run = psgd.folder / "runs" / "digits"
    options = ("--resume", "--set", f"consistency.mode={mode}", "--set", "checkpoint.every_updates=100")
    rng = np.random.default_rng(0)
    for _ in range(10):
        pushed = len(recorded(run, "worker_up"))
        with psgd.started(*train(ENDLESS, *options)) as driver:
            eventually(lambda up=pushed: len(recorded(run, "worker_up")) > up)  # type: ignore[misc]
            time.sleep(rng.uniform(0.0, 4.0))  # the moment of the kill, not a wait for anything
            driver.kill()
        eventually(lambda: not psgd.processes())
    end_exactly(psgd, *options)
    replayed = psgd.run("replay", "digits")
    assert replayed.returncode == 0, replayed.stderr
    assert "bit for bit" in replayed.stdout


@pytest.mark.chaos
@pytest.mark.timeout(300)
def test_a_driver_that_was_stopped_for_a_while_gives_up_no_worker(psgd: CommandLine) -> None:
    run = psgd.folder / "runs" / "digits"
    with psgd.started(*train(ENDLESS, "--set", "failure.timeout_s=3")) as driver:
        for _ in range(3):
            seen = len(recorded(run, "evaluated"))
            eventually(lambda up=seen: len(recorded(run, "evaluated")) > up)  # type: ignore[misc]
            driver.send_signal(signal.SIGSTOP)
            time.sleep(12.0)  # four times the limit for a silent worker
            driver.send_signal(signal.SIGCONT)
        seen = len(recorded(run, "evaluated"))
        eventually(lambda: len(recorded(run, "evaluated")) > seen)
        driver.send_signal(signal.SIGINT)
        stderr = driver.communicate(timeout=LIMIT_S)[1]
    assert driver.returncode == 130, stderr
    assert json.loads((run / "result.json").read_text())["failures"] == {}
    assert len(recorded(run, "paused")) == 3


CSV = ("--set", "data={format: csv, path: table.csv, label: right, batch_size: 2}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "data={format: npz, path: nowhere.npz}"), "nowhere.npz"),
        (CSV, "line 3, column 'wide'"),
        (("--address", "ray://127.0.0.1:10001"), "psgd submit JOB.yaml --address http://HEAD:8265"),
        (("--address", "127.0.0.1:1"), "nothing answers at 127.0.0.1:1"),
        (("--storage", "table.csv/runs"), "cannot write"),
    ],
    ids=["no data", "nan in the data", "ray client", "nobody there", "unwritable storage"],
)
def test_bad_input_is_refused_with_exit_2(psgd: CommandLine, arguments: tuple[str, ...], message: str) -> None:
    (psgd.folder / "table.csv").write_text("tall,wide,right\n1,2,0\n3,nan,1\n5,6,0\n7,8,1\n")
    began = time.monotonic()
    refused = psgd.run("train", DIGITS, "--json", *arguments)
    assert time.monotonic() - began < 30
    assert refused.returncode == 2, refused.stderr
    document = json.loads(refused.stdout)
    assert (document.keys(), document["status"]) == ({"status", "error"}, "refused")
    assert message in document["error"]
    assert refused.stderr == f"psgd: {document['error']}\n"
    assert not (psgd.folder / "runs" / "digits").exists()
