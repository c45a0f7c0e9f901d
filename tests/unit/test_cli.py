from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from psgd.cli import main
from psgd.errors import RunFailedError
from psgd.result import LedgerCounts, Result
from psgd.spec import JobSpec
from psgd.spec.reader import load_spec
from psgd.store.run_directory import RunDirectory
from psgd.store.storage import Storage

JOB = """
model: {kind: linear}
data: {format: sklearn, dataset: iris}
optimizer: {lr: 1e-1}
run: {epochs: 1}
"""


@pytest.fixture(autouse=True)
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A valid job.yaml in the folder where commands run."""
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(JOB)


@pytest.fixture
def run(job: None) -> RunDirectory:
    """A run under way."""
    run = RunDirectory(Storage("runs/iris"))
    run.own()
    run.begin(load_spec("job.yaml"))
    run.event("started", incarnation=1, resumed=None)
    return run


@pytest.fixture
def psgd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The command line in this process: arguments -> exit code, stdout, stderr."""

    def command(*arguments: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["psgd", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return (ended.value.code, *capsys.readouterr())

    return command


def result(status: Any) -> Result:
    counts = LedgerCounts(batches=5, applied=5, duplicates=0, requeued=0, discarded=0)
    names = ("train/loss", "val/loss", "val/accuracy", "perf/updates_per_s", "async/staleness_mean")
    error = "worker-0 [red]: scripted" if status in ("failed", "unsaved") else None
    metrics = dict.fromkeys(names)
    return Result(status, "iris", "runs/iris", 1, 5, 150, 0.5, metrics, counts, {}, None, None, error)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["submit", "-h"], ["--version"]])
def test_help_and_version_import_nothing_heavy(arguments: list[str]) -> None:
    heavy = {"ray", "numpy", "torch", "fsspec", "yaml", "psgd.spec"}  # pydantic: typer loads it for options of its own
    report = f"print({heavy} & set(sys.modules), file=sys.stderr)"
    script = f"import sys, atexit; atexit.register(lambda: {report}); from psgd.cli import main; main()"
    told = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60)
    assert told.returncode == 0
    assert told.stderr == "set()\n"
    assert told.stdout == f"psgd {version('psgd')}\n" if arguments == ["--version"] else "Usage" in told.stdout


def test_validate_prints_the_job_with_every_default(psgd: Any) -> None:
    code, out, err = psgd("validate", "job.yaml", "--set", "scaling.workers=5")
    assert (code, err) == (0, "")
    assert JobSpec.model_validate(yaml.safe_load(out)) == load_spec("job.yaml", ["scaling.workers=5"])
    assert {"consistency", "checkpoint", "failure"} <= yaml.safe_load(out).keys()


def test_schema_is_that_of_the_job(psgd: Any) -> None:
    code, out, err = psgd("schema")
    assert (code, err) == (0, "")
    assert json.loads(out) == JobSpec.model_json_schema()


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
        ("finished", 0, "finished iris: 1 epochs, 5 updates"),
        ("stopped", 0, "--resume continues it"),
        ("interrupted", 130, "--resume continues it"),
        ("failed", 3, "worker-0 [red]: scripted"),
        ("unsaved", 3, "worker-0 [red]: scripted"),
    ],
)
def test_how_a_run_ended_is_the_exit_code(
    psgd: Any, monkeypatch: pytest.MonkeyPatch, status: str, code: int, told: str
) -> None:
    def run_here(*arguments: Any) -> Result:
        print("a model's own print")
        return result(status)

    monkeypatch.setattr("psgd.cli._run", run_here)
    ended, out, err = psgd("train", "job.yaml", "--json")
    assert ended == code
    assert json.loads(out) == result(status).to_dict()
    assert told in err
    assert "a model's own print" in err


def test_a_run_that_fails_by_raising_is_failed_not_refused(psgd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Result:
        raise RunFailedError("scripted", result("failed"))

    monkeypatch.setattr("psgd.cli._run", fail)
    code, out, err = psgd("train", "job.yaml", "--json")
    assert (code, json.loads(out), err) == (3, {"status": "failed", "error": "scripted"}, "psgd: scripted\n")


def test_status_of_a_run_under_way_is_its_owner_and_newest_metrics(psgd: Any, run: RunDirectory) -> None:
    assert json.loads(psgd("status", "iris")[1])["metrics"] is None
    run.metrics({"updates": 1})
    run.metrics({"updates": 2})
    code, out, _ = psgd("status", "iris")
    told = json.loads(out)
    assert (code, told["status"], told["owner"]["incarnation"]) == (0, "running", 1)
    assert [line["updates"] for line in told["metrics"]] == [2]


def test_status_of_an_ended_run_is_its_result_until_it_is_resumed(psgd: Any, run: RunDirectory) -> None:
    run.event("finished", status="stopped", error=None)
    run.finish(result("stopped"))
    assert json.loads(psgd("status", "iris")[1]) == result("stopped").to_dict()
    run.event("started", incarnation=2, resumed="000001-1")
    assert json.loads(psgd("status", "iris")[1])["status"] == "running"


def test_logs_are_the_events_without_what_is_none(psgd: Any, run: RunDirectory) -> None:
    code, out, err = psgd("logs", "iris")
    assert (code, err) == (0, "")
    assert out.split()[2:] == ["started", "incarnation=1"]


def test_stop_leaves_a_command_for_the_driver(psgd: Any, run: RunDirectory) -> None:
    code, out, _ = psgd("stop", "iris", "--storage", "runs")
    assert code == 0
    assert "asked iris to stop" in out
    assert [command["command"] for command in run.take_commands()] == ["stop"]


def test_set_leaves_the_settings_for_the_driver(psgd: Any, run: RunDirectory) -> None:
    code, out, _ = psgd("set", "iris", "consistency.mode=bsp", "optimizer.lr=0.5")
    assert code == 0
    assert "asked iris for consistency.mode=bsp optimizer.lr=0.5" in out
    (command,) = run.take_commands()
    assert (command["command"], command["settings"]) == ("set", ["consistency.mode=bsp", "optimizer.lr=0.5"])


@pytest.mark.parametrize("command", [["status"], ["logs"], ["stop"], ["replay"], ["set"]], ids=lambda words: words[0])
def test_a_run_that_is_not_there_is_refused_with_exit_2(psgd: Any, command: list[str]) -> None:
    settings = ["optimizer.lr=1"] if command == ["set"] else []
    code, out, err = psgd(*command, "nowhere", *settings)
    assert (code, out) == (2, "")
    assert err.startswith("psgd: there is no run in ")


def test_a_source_folder_that_is_not_there_is_refused_with_exit_2(psgd: Any) -> None:
    code, out, err = psgd("submit", "job.yaml", "--address", "http://127.0.0.1:1", "--py-module", "nowhere")
    assert (code, out) == (2, "")
    assert "'nowhere' does not exist" in err
