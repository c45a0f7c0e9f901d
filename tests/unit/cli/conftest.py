"""The command line in this process, in a folder with a job and a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from psgd.cli import main
from psgd.spec.reader import load_spec
from psgd.store.run_directory import RunDirectory
from psgd.store.storage import Storage
from tests.support.run_records import start

JOB = """
model: {kind: linear}
data: {format: sklearn, dataset: iris}
optimizer: {lr: 1e-1}
run: {epochs: 1}
"""


@pytest.fixture(autouse=True)
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a valid job.yaml to the folder in which commands run."""
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(JOB)


@pytest.fixture
def run(job: None) -> RunDirectory:
    """Return the directory of a run whose driver is this process."""
    run = RunDirectory(Storage("runs/iris"))
    run.own()
    run.begin(load_spec("job.yaml"))
    start(run)
    return run


@pytest.fixture
def psgd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that runs a command in this process: arguments -> exit code, stdout, stderr."""

    def command(*arguments: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["psgd", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return (ended.value.code, *capsys.readouterr())

    return command
