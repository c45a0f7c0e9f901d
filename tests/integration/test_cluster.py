"""Runs on a running cluster with authentication: driven from this process, and submitted as Ray jobs."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from secrets import token_hex
from typing import Any

import pytest
import yaml

import psgd
import psgd_workers
from tests.support.command_line import DIGITS, LIMIT_S, CommandLine, eventually, recorded

PORTS = (
    *("port", "node-manager-port", "object-manager-port", "ray-client-server-port", "metrics-export-port"),
    *("dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port"),
)
WORKER_PORTS = 40
TRAIN = ("train", DIGITS, "--set", "run.epochs=3")


@dataclass(frozen=True, slots=True)
class Cluster:
    """A running cluster of one node with 4 CPUs."""

    address: str
    dashboard: str
    environment: dict[str, str]

    def living(self) -> list[str]:
        """Return the class names of the actors that are alive, including those of Ray's job manager."""
        token = Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        with closing(HTTPConnection(self.dashboard.removeprefix("http://"), timeout=LIMIT_S)) as dashboard:
            dashboard.request("GET", "/api/v0/actors", headers={"Authorization": f"Bearer {token}"})
            actors = json.load(dashboard.getresponse())["data"]["result"]["result"]
        return [actor["class_name"] for actor in actors if actor["state"] != "DEAD"]


@pytest.fixture(scope="module")
def cluster(ray_home: Path, environment: dict[str, str]) -> Iterator[Cluster]:
    """Start a head by its full path, on free ports and with a token of its own; it ends with the module."""
    bin_ = Path(sys.executable).parent  # not on the PATH of the head
    token = ray_home / "token"
    token.write_text(token_hex(32))
    secured = environment | {
        "PATH": "/usr/bin:/bin",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
    }
    numbers = free_ports(len(PORTS) + WORKER_PORTS)
    ports = dict(zip(PORTS, numbers, strict=False))
    options = {name: str(number) for name, number in ports.items()} | {
        "worker-port-list": ",".join(map(str, numbers[len(PORTS) :])),
        "node-ip-address": "127.0.0.1",
        "temp-dir": str(ray_home),
        "num-cpus": "4",
        "include-dashboard": "true",
        "object-store-memory": str(200 * 2**20),
    }
    command = [str(bin_ / "ray"), "start", "--head", "--block", *(f"--{name}={text}" for name, text in options.items())]
    log_file = ray_home / "ray.log"
    with (
        log_file.open("w") as log,
        subprocess.Popen(command, env=secured, stdout=log, stderr=log, start_new_session=True) as head,
    ):
        try:
            eventually(lambda: "will now block" in log_file.read_text(), LIMIT_S)
            yield Cluster(f"127.0.0.1:{ports['port']}", f"http://127.0.0.1:{ports['dashboard-port']}", secured)
        finally:
            head.terminate()
            head.wait(LIMIT_S)
    eventually(lambda: not CommandLine(secured, ray_home).processes())


@pytest.fixture
def command(cluster: Cluster, tmp_path: Path) -> CommandLine:
    """Return the command line outside the source tree, with the cluster's token."""
    return CommandLine(cluster.environment, tmp_path)


def free_ports(count: int) -> list[int]:
    """Return different free ports below the range from which the system gives out ports itself."""
    first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    candidates = list(range(10_000, first_ephemeral))
    found = list[int]()
    random.Random(os.getpid()).shuffle(candidates)  # noqa: S311 (nothing here is a secret)
    for port in candidates:
        with socket.socket() as each, suppress(OSError):
            each.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            break
    return found


def job_status(command: CommandLine, cluster: Cluster, run: str) -> str:
    """Return the status of a submitted run, as Ray's job manager names it."""
    done = command.run("status", run, "--address", cluster.dashboard)
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)["status"])


def copy_source(folder: Path) -> Path:
    """Copy both packages; each process that imports the copied worker module writes down the module's path."""
    for package in (psgd, psgd_workers):
        shutil.copytree(Path(str(package.__file__)).parent, folder / "source" / package.__name__)
    with (folder / "source" / "psgd_workers" / "worker.py").open("a") as file:
        file.write("import os, pathlib\n")
        file.write(f"pathlib.Path({str(folder)!r}, f'{{os.getpid()}}.imported').write_text(__file__)\n")
    return folder / "source"


def test_a_driver_here_ships_its_source_and_leaves_no_actor(
    cluster: Cluster, command: CommandLine, tmp_path: Path
) -> None:
    source = copy_source(tmp_path)
    done = command.run(*TRAIN, "--json", "--address", cluster.address, PYTHONPATH=str(source))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["status"], result["path"]) == ("finished", str(tmp_path / "runs" / "digits"))
    imported = [Path(file.read_text()) for file in tmp_path.glob("*.imported")]
    shipped = [file for file in imported if "py_modules_files" in file.parts]
    assert len(shipped) >= 2  # one server and one worker; the driver itself imported the copy
    assert set(imported) - set(shipped) == {source / "psgd_workers" / "worker.py"}
    eventually(lambda: cluster.living() == [])


def test_a_job_that_does_not_fit_is_refused_after_its_patience(cluster: Cluster, command: CommandLine) -> None:
    large = (*TRAIN, "--address", cluster.address, "--set", "scaling.workers=64")
    message = "the job needs 64 CPUs (64 workers), but the cluster has 4 CPUs"
    refused = command.run(*large)
    assert (refused.returncode, message in refused.stderr) == (2, True), refused.stderr
    began = time.monotonic()
    refused = command.run(*large, "--set", "failure.start_timeout_s=2")
    assert time.monotonic() - began > 2
    assert (refused.returncode, message in refused.stderr) == (2, True), refused.stderr
    assert not (command.folder / "runs" / "digits").exists()


def test_a_submitted_job_is_followed_by_status_and_logs(cluster: Cluster, command: CommandLine) -> None:
    storage = command.folder / "kept"
    submitted = command.run(
        "submit", *TRAIN[1:], "--storage", str(storage), "--no-wait", "--address", cluster.dashboard
    )
    assert submitted.returncode == 0, submitted.stderr
    assert submitted.stdout.startswith("raysubmit_")
    eventually(lambda: job_status(command, cluster, "digits") not in ("PENDING", "RUNNING"), LIMIT_S)
    assert job_status(command, cluster, "digits") == "SUCCEEDED"
    status = json.loads(command.run("status", "digits", "--address", cluster.dashboard).stdout)
    assert status["progress"].startswith("epoch 3/3  loss ")
    assert "finished digits: 3 epochs" in command.run("logs", "digits", "--address", cluster.dashboard).stdout
    assert json.loads((storage / "digits" / "result.json").read_text())["status"] == "finished"
    assert json.loads(command.run("status", "digits", "--storage", str(storage)).stdout)["epochs"] == 3


MODEL = """
from pathlib import Path
import psgd_workers
from psgd_workers.models.numpy.network import Network

def build(record):
    Path(record).write_text(f"{__file__}\\n{psgd_workers.__file__}")
    return Network((64, 10), "cross_entropy")
"""


def own_job(folder: Path, **run: Any) -> str:
    """Write a job whose model is the user's package `ours`, which is not installed; return the job file's path."""
    (folder / "ours").mkdir(exist_ok=True)
    (folder / "ours" / "__init__.py").write_text(MODEL)
    tree = {
        "name": "own",
        "model": {"kind": "python", "path": "ours:build", "kwargs": {"record": str(folder / "record")}},
        "data": {"format": "sklearn", "dataset": "digits"},
        "optimizer": {"lr": 0.1},
        "checkpoint": {"every_updates": 100},
        "run": {"storage": str(folder / "runs"), **run},
    }
    (folder / "own.yaml").write_text(yaml.safe_dump(tree))
    return str(folder / "own.yaml")


def test_a_users_model_travels_and_the_run_is_continued_and_stopped(cluster: Cluster, command: CommandLine) -> None:
    folder = command.folder
    run = folder / "runs" / "own"
    options = ("--py-module", "ours", "--address", cluster.dashboard)
    waited = command.run("submit", own_job(folder, epochs=2), *options)
    assert waited.returncode == 0, waited.stderr
    assert "finished own: 2 epochs" in waited.stderr
    model, workers = map(Path, (folder / "record").read_text().splitlines())
    assert model.parts[-2:] == ("ours", "__init__.py")
    assert all("py_modules_files" in file.parts for file in (model, workers))

    saved = len(recorded(run, "checkpoint"))
    with command.started("submit", own_job(folder, epochs=100_000), *options) as waiting:
        eventually(lambda: len(recorded(run, "checkpoint")) > saved, LIMIT_S)
        assert recorded(run, "started")[-1]["resumed"] is not None
        assert job_status(command, cluster, "own") == "RUNNING"
        assert command.run("stop", "own", "--address", cluster.dashboard).returncode == 0
        stderr = waiting.communicate(timeout=LIMIT_S)[1]
    assert waiting.returncode == 3, stderr
    assert "ended STOPPED" in stderr
    newest = recorded(run, "checkpoint")[-1]
    assert newest["updates"] > 2 * 57  # ceil(1797 / 32) batches an epoch
    assert (run / "checkpoints" / newest["name"] / "COMMITTED").exists()
    eventually(lambda: cluster.living() == [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--storage", "/kept", "--address", "http://127.0.0.1:1"), "nothing answers at http://127.0.0.1:1"),
        (("--storage", "/kept", "--address", "127.0.0.1:8265"), "expected the URL of Ray's dashboard"),
        (("--storage", "kept"), "'kept' is relative"),
        (("--storage", "/kept", "--set", "data={format: csv, path: table.csv}"), "data.path: 'table.csv' is relative"),
    ],
    ids=["nobody there", "no URL", "storage in the job's folder", "data in this folder"],
)
def test_a_job_that_cannot_be_submitted_is_refused(
    cluster: Cluster, command: CommandLine, arguments: tuple[str, ...], message: str
) -> None:
    refused = command.run("submit", DIGITS, "--address", cluster.dashboard, *arguments)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert message in refused.stderr


def test_without_the_token_nobody_gets_in(cluster: Cluster, command: CommandLine) -> None:
    lost = {"RAY_AUTH_TOKEN_PATH": str(command.folder / "nowhere")}
    for arguments in ((*TRAIN, "--address", cluster.address), ("status", "run", "--address", cluster.dashboard)):
        refused = command.run(*arguments, **lost)
        assert refused.returncode == 2
        assert refused.stderr.startswith("psgd: ")
    refused = command.run("status", "run", "--address", cluster.dashboard, RAY_AUTH_MODE="disabled")
    assert refused.returncode == 2
    assert "Authentication required" in refused.stderr


def test_a_wrong_token_is_told_with_where_it_was_read(cluster: Cluster, command: CommandLine) -> None:
    (command.folder / "wrong").write_text(token_hex(32))
    refused = command.run(*TRAIN, "--address", cluster.address, RAY_AUTH_TOKEN_PATH=str(command.folder / "wrong"))
    assert refused.returncode == 2
    assert "this driver's token is not the cluster's" in refused.stderr


def test_the_dashboards_port_is_recognised_at_once(cluster: Cluster, command: CommandLine) -> None:
    address = cluster.dashboard.removeprefix("http://")
    began = time.monotonic()
    refused = command.run(*TRAIN, "--address", address)
    assert time.monotonic() - began < 30
    assert (refused.returncode, "Traceback" in refused.stderr) == (2, False)
    assert f"psgd submit JOB.yaml --address {cluster.dashboard}" in refused.stderr
    variable = command.run(*TRAIN, RAY_ADDRESS=cluster.dashboard)
    assert (variable.returncode, "RAY_ADDRESS" in variable.stderr) == (2, True)


def test_a_job_that_its_driver_refuses_is_refused_here_and_told_once(cluster: Cluster, command: CommandLine) -> None:
    job = own_job(command.folder, epochs=2)  # without --py-module, so the cluster lacks its model
    refused = command.run("submit", job, "--address", cluster.dashboard)
    assert refused.returncode == 2, refused.stderr
    assert refused.stderr.count("No module named 'ours'") == 1


def test_ctrl_c_leaves_a_submitted_run_going_on(cluster: Cluster, command: CommandLine) -> None:
    job = own_job(command.folder, epochs=100_000)
    run = command.folder / "runs" / "own"
    with command.started("submit", job, "--py-module", "ours", "--address", cluster.dashboard) as waiting:
        eventually(lambda: recorded(run, "evaluated") or recorded(run, "checkpoint"), LIMIT_S)
        os.killpg(waiting.pid, signal.SIGINT)
        stderr = waiting.communicate(timeout=LIMIT_S)[1]
    assert waiting.returncode == 130
    assert f"psgd stop own --address {cluster.dashboard}" in stderr
    assert job_status(command, cluster, "own") == "RUNNING"
    assert command.run("stop", "own", "--address", cluster.dashboard).returncode == 0
    eventually(lambda: cluster.living() == [])
