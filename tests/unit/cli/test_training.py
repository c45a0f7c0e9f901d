from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from psgd.errors import RunFailedError
from psgd.result import LedgerCounts, Result


def result(status: Any) -> Result:
    counts = LedgerCounts(batches=5, applied=5, duplicates=0, requeued=0, discarded=0)
    names = ("train/loss", "val/loss", "val/accuracy", "perf/updates_per_s", "async/staleness_mean")
    error = "worker-0 [red]: scripted" if status in ("failed", "unsaved") else None
    metrics = dict.fromkeys(names)
    return Result(status, "iris", "runs/iris", 1, 5, 150, 0.5, metrics, counts, {}, None, None, error)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.lerning_rate=1"], "optimizer.lerning_rate: unknown field; did you mean 'learning_rate'?"),
        (["run.epochs=null"], "run: a run must end: give at least one of epochs, max_updates, max_time_s"),
        (
            ["data={format: npz, path: x.npz, validation_features: a, validation_labels: b, validation_fraction: 0.1}"],
            "or validation_fraction, not both",
        ),
        (["optimizer.lr=-1", "seed=-1"], "seed: "),
    ],
    ids=["unknown field", "none of several", "both of two", "two faults"],
)
def test_a_wrong_job_is_refused_with_exit_2(psgd: Any, overrides: list[str], message: str) -> None:
    options = [option for override in overrides for option in ("--set", override)]
    code, out, err = psgd("validate", "job.yaml", *options)
    assert (code, out) == (2, "")
    assert err.startswith("psgd: job.yaml is not a valid job:\n")
    assert message in err
    code, out, told = psgd("train", "job.yaml", "--json", *options)
    assert (code, told) == (2, err)
    assert json.loads(out) == {"status": "refused", "error": err.removeprefix("psgd: ").rstrip("\n")}


def test_a_missing_job_file_is_refused_with_exit_2(psgd: Any) -> None:
    code, out, err = psgd("train", "nowhere.yaml")
    assert (code, out) == (2, "")
    assert err.startswith("psgd: cannot read the job file 'nowhere.yaml'")


@pytest.mark.parametrize(
    ("status", "code", "told"),
    [
        ("finished", 0, "finished iris: 1 epoch, 5 updates"),
        ("stopped", 0, "--resume continues it"),
        ("interrupted", 130, "--resume continues it"),
        ("failed", 3, "worker-0 [red]: scripted"),
        ("unsaved", 3, "worker-0 [red]: scripted"),
    ],
)
def test_how_a_run_ended_is_the_exit_code(
    psgd: Any, monkeypatch: pytest.MonkeyPatch, status: str, code: int, told: str
) -> None:
    def run_here(*arguments: Any, **options: Any) -> Result:
        print("a model's own print")
        return result(status)

    monkeypatch.setattr("psgd.cluster.run.run_job", run_here)
    ended, out, err = psgd("train", "job.yaml", "--json")
    assert ended == code
    assert json.loads(out) == result(status).to_dict()
    assert told in err
    assert "a model's own print" in err


def test_the_summary_names_the_epoch_that_was_validated(psgd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics: dict[str, float | None] = {"val/accuracy": 0.9, "val/epoch": 6.0}
    ended = replace(result("interrupted"), epochs=7, metrics=metrics)
    monkeypatch.setattr("psgd.cluster.run.run_job", lambda *_, **__: ended)
    told = psgd("train", "job.yaml")[2].splitlines()
    assert told[0].startswith("interrupted iris: 7 epochs")
    assert told[1:3] == ["  validation accuracy  0.9000", "  validated at epoch   6"]


def test_a_run_that_fails_by_raising_is_failed_not_refused(psgd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> Result:
        raise RunFailedError("scripted", result("failed"))

    monkeypatch.setattr("psgd.cluster.run.run_job", fail)
    code, out, err = psgd("train", "job.yaml", "--json")
    assert (code, json.loads(out), err) == (3, {"status": "failed", "error": "scripted"}, "psgd: scripted\n")


@pytest.mark.parametrize("name", ["mk[/b]d", "q[x]q", ":smile:", "[red]"])
@pytest.mark.parametrize("status", ["finished", "stopped", "failed"])
def test_names_and_paths_are_printed_as_they_are(
    psgd: Any, monkeypatch: pytest.MonkeyPatch, status: str, name: str
) -> None:
    ended = replace(result(status), name=name, path=f"runs/{name}", error=f"cannot write {name}")
    monkeypatch.setattr("psgd.cluster.run.run_job", lambda *arguments, **options: ended)
    code, _, err = psgd("train", "job.yaml", "--storage", name)
    assert code == (3 if status == "failed" else 0)
    assert f"{status} {name}: 1 epoch," in err
    assert f"runs/{name}\n" in err
    assert f"cannot write {name}\n" in err


CONTINUES = "job raysubmit_7 continues on the cluster; `psgd stop job --address http://head:8265` ends it"
SUBMIT = """
import os, signal, sys, threading
from types import SimpleNamespace
import psgd.cluster.jobs
from psgd.cli import main
from psgd.interruption import Interruption

class Watched(Interruption):
    def request(self, number):
        try:
            return super().request(number)
        finally:
            requested.set()

def submit(*arguments):
    if "submit" == "{moment}":
        os.kill(os.getpid(), signal.SIGINT)
        assert requested.wait(30)
    return "raysubmit_7"

def wait(*arguments):
    os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait()

requested = threading.Event()
psgd.cli.Interruption = Watched
psgd.cluster.jobs.Jobs = lambda address: SimpleNamespace(submit=submit, wait=wait)
sys.argv = ["psgd", "submit", "job.yaml", "--address", "http://head:8265"]
main()
"""


@pytest.mark.parametrize(
    ("moment", "lines"),
    [
        (
            "submit",
            [
                "psgd: interrupted: the job is submitted first. The same signal again ends psgd at once",
                f"psgd: {CONTINUES}",
            ],
        ),
        ("wait", [f"psgd: interrupted: {CONTINUES}"]),
    ],
)
def test_an_interrupted_submit_says_that_the_job_goes_on(moment: str, lines: list[str]) -> None:
    command = [sys.executable, "-c", SUBMIT.format(moment=moment)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (told.returncode, told.stdout) == (130, "raysubmit_7\n")
    assert sorted(told.stderr.splitlines()) == sorted(lines)  # two threads write


def test_a_source_folder_that_is_not_there_is_refused_with_exit_2(psgd: Any) -> None:
    code, out, err = psgd("submit", "job.yaml", "--address", "http://127.0.0.1:1", "--py-module", "nowhere")
    assert (code, out) == (2, "")
    assert "'nowhere' does not exist" in err
