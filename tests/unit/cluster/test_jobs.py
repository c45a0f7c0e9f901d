"""Runs as Ray jobs, with a fake job server."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobDetails, JobStatus, JobType

from psgd.cluster import jobs as module
from psgd.cluster.jobs import DRIVER_SCRIPT, Jobs
from psgd.errors import ClusterError, InputError, RunError, SpecError
from psgd.spec import JobSpec
from tests.support.jobs import job

ADDRESS = "http://head:8265"
REFUSAL = (
    "Job entrypoint command failed with exit code 2, last available logs (truncated to 20,000 chars):\npsgd: no data"
)


class JobServer:
    """A fake of Ray's client of the job server.

    Attributes:
        submitted: arguments of each submitted job.
        uploaded: content of the files in the newest job's folder, by name.
        details: fields of `JobDetails` for every job.
        output: output of every job.
        interrupts: True if the user presses Ctrl-C while the output is printed.
        stopped: ids of the jobs that were asked to stop.
    """

    def __init__(self) -> None:
        self.submitted: list[dict[str, Any]] = []
        self.uploaded: dict[str, str] = {}
        self.details: dict[str, Any] = {"status": JobStatus.SUCCEEDED, "message": "Job finished successfully."}
        self.output = ""
        self.interrupts = False
        self.stopped: list[str] = []

    def submit_job(self, **arguments: Any) -> str:
        self.submitted.append(arguments)
        folder = Path(arguments["runtime_env"]["working_dir"])
        self.uploaded = {file.name: file.read_text() for file in folder.iterdir()}
        return "raysubmit_1"

    def get_job_info(self, identifier: str) -> JobDetails:
        return JobDetails(
            type=JobType.SUBMISSION,
            entrypoint="",
            submission_id=identifier,
            metadata={"psgd_run": "run"},
            **self.details,
        )

    def list_jobs(self) -> list[JobDetails]:
        return [self.get_job_info("raysubmit_1")]

    def get_job_logs(self, identifier: str) -> str:
        return self.output

    def stop_job(self, identifier: str) -> None:
        self.stopped.append(identifier)

    async def tail_job_logs(self, identifier: str) -> AsyncIterator[str]:
        yield self.output
        if self.interrupts:
            raise KeyboardInterrupt


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> JobServer:
    made = JobServer()
    monkeypatch.setattr(module, "JobSubmissionClient", lambda address: made)
    monkeypatch.setattr(module, "check_listening", lambda host, port, address: None)
    return made


def spec(**sections: Any) -> JobSpec:
    return job(**{"run": {"epochs": 1, "storage": "/kept"}} | sections)


def test_a_job_travels_with_its_source(server: JobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ours").mkdir()
    assert Jobs(ADDRESS).submit(spec(), "my run", [Path("ours")]) == "raysubmit_1"
    (sent,) = server.submitted
    assert sent["entrypoint"] == "exec sh driver.sh 'my run'"
    assert sent["metadata"] == {"psgd_run": "my run"}
    modules = [Path(folder) for folder in sent["runtime_env"]["py_modules"]]
    assert [folder.name for folder in modules] == ["psgd", "psgd_workers", "ours"]
    assert all(folder.is_absolute() for folder in modules)
    assert server.uploaded.keys() == {"job.yaml", "driver.sh"}


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"run": {"epochs": 1, "storage": "kept"}}, "run.storage: 'kept'"),
        ({"data": {"format": "csv", "path": "table.csv"}}, "data.path: 'table.csv'"),
        ({"data": {"format": "npz", "path": "./mnist.npz"}}, "data.path: './mnist.npz'"),
    ],
)
def test_paths_of_this_folder_are_refused_before_anything_is_submitted(
    server: JobServer, sections: dict[str, Any], field: str
) -> None:
    with pytest.raises(SpecError) as refused:
        Jobs(ADDRESS).submit(spec(**sections), "run")
    assert str(refused.value).startswith(f"{field} is relative")
    assert server.submitted == []


@pytest.mark.parametrize("path", ["/data/mnist.npz", "~/mnist.npz", "s3://bucket/mnist.npz"])
def test_paths_that_the_cluster_may_have_are_submitted(server: JobServer, path: str) -> None:
    Jobs(ADDRESS).submit(spec(data={"format": "npz", "path": path}), "run")
    assert len(server.submitted) == 1


def test_the_driver_is_run_by_the_interpreter_that_ray_is_installed_in(tmp_path: Path) -> None:
    """Like Ray's job server, this process has loaded Ray's library and runs a command by a shell."""
    (tmp_path / "driver.sh").write_text(DRIVER_SCRIPT)
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("sed", "head", "sh"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    environment = {**os.environ, "PATH": str(tools)}
    ran = subprocess.run(
        ["/bin/sh", "-c", "exec sh driver.sh run"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, "job.yaml" in ran.stderr) == (2, True), ran.stderr
    assert ran.stderr.startswith("psgd: ")


def test_output_is_passed_on_until_the_run_has_succeeded(server: JobServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.output = "epoch 1/1 done\n"
    Jobs(ADDRESS).wait("raysubmit_1", "run")
    assert capsys.readouterr().err == "epoch 1/1 done\n"


def test_a_refusal_is_printed_once(server: JobServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.output = "psgd: no data\n"
    server.details = {"status": JobStatus.FAILED, "message": REFUSAL, "driver_exit_code": 2}
    with pytest.raises(InputError, match="its driver refused the training job") as refused:
        Jobs(ADDRESS).wait("raysubmit_1", "run")
    assert (capsys.readouterr().err + str(refused.value)).count("no data") == 1


@pytest.mark.parametrize(
    ("status", "message", "expected"),
    [
        (JobStatus.FAILED, REFUSAL.replace("code 2", "code 3"), "ended FAILED: Job entrypoint command .* exit code 3$"),
        (JobStatus.FAILED, "runtime_env setup failed", "ended FAILED: runtime_env setup failed"),
        (JobStatus.STOPPED, "Job was intentionally stopped.", "ended STOPPED: Job was intentionally stopped"),
        (JobStatus.RUNNING, "Job is currently running.", f"connection to {ADDRESS} was lost; run run goes on"),
    ],
)
def test_a_run_that_did_not_succeed_says_why(server: JobServer, status: JobStatus, message: str, expected: str) -> None:
    server.details = {"status": status, "message": message, "driver_exit_code": 3}
    with pytest.raises(RunError, match=expected):
        Jobs(ADDRESS).wait("raysubmit_1", "run")


def test_ctrl_c_says_that_the_run_goes_on(server: JobServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.interrupts = True
    with pytest.raises(KeyboardInterrupt):
        Jobs(ADDRESS).wait("raysubmit_1", "run")
    told = capsys.readouterr().err
    assert "run run goes on as job raysubmit_1" in told
    assert f"psgd stop run --address {ADDRESS}" in told


@pytest.mark.parametrize(
    ("output", "progress"),
    [
        ("psgd 1\nepoch 1/9 done  loss 0.5\nepoch 2/9 done  loss 0.4\nfinished\n", "epoch 2/9 done  loss 0.4"),
        ("Running entrypoint\n", None),
    ],
)
def test_the_status_of_a_run_shows_its_newest_epoch_and_loss(
    server: JobServer, output: str, progress: str | None
) -> None:
    server.output = output
    server.details = {"status": JobStatus.FAILED, "message": REFUSAL}
    told = Jobs(ADDRESS).status("run")
    assert told == {
        "status": "FAILED",
        "job": "raysubmit_1",
        "message": "Job entrypoint command failed with exit code 2",
        "progress": progress,
    }


def test_only_a_run_that_has_not_ended_is_asked_to_stop(server: JobServer) -> None:
    with pytest.raises(InputError, match="run run is not running: its job raysubmit_1 ended SUCCEEDED"):
        Jobs(ADDRESS).stop("run")
    assert server.stopped == []
    server.details = {"status": JobStatus.RUNNING, "message": ""}
    Jobs(ADDRESS).stop("run")
    assert server.stopped == ["raysubmit_1"]


@pytest.mark.parametrize("address", ["http://head:abc", "http://head:99999", "http://[x", "head:8265", "ftp://head"])
def test_an_address_that_is_no_url_of_a_dashboard_is_refused(address: str) -> None:
    with pytest.raises(ClusterError, match=r"expected the URL of Ray's dashboard, such as http://HEAD:8265"):
        Jobs(address)


def test_a_source_directory_with_a_secret_is_submitted_only_if_that_is_wanted(
    server: JobServer, tmp_path: Path
) -> None:
    (tmp_path / ".env").touch()
    with pytest.raises(InputError, match=r"look like passwords or private keys: \.env\."):
        Jobs(ADDRESS).submit(spec(), "run", [tmp_path])
    assert server.submitted == []
    Jobs(ADDRESS).submit(spec(), "run", [tmp_path], with_secrets=True)
    assert ".env" not in server.submitted[0]["runtime_env"]["excludes"]


def test_the_password_of_a_dashboard_is_shown_nowhere(server: JobServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.interrupts = True
    with pytest.raises(KeyboardInterrupt):
        Jobs("http://me:secret@head:8265").wait("raysubmit_1", "run")
    server.details = {"status": JobStatus.RUNNING, "message": ""}
    server.interrupts = False
    with pytest.raises(RunError, match=r"http://\*\*\*@head:8265 was lost"):
        Jobs("http://me:secret@head:8265").wait("raysubmit_1", "run")
    assert "secret" not in capsys.readouterr().err
