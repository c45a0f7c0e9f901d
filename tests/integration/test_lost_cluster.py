"""Runs whose local Ray loses its raylet, or does not start."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from tempfile import mkdtemp

import pytest
import ray

from tests.support.command_line import DIGITS, LIMIT_S, CommandLine, eventually, recorded
from tests.support.killer import ray_processes


@pytest.fixture
def psgd(tmp_path: Path, ray_home: Path, environment: dict[str, str]) -> CommandLine:
    """Return the command line with a Ray folder of its own."""
    return CommandLine(environment | {"RAY_TMPDIR": mkdtemp(dir=ray_home), "RAY_AUTH_MODE": "disabled"}, tmp_path)


def test_a_run_whose_raylet_dies_has_failed_and_can_be_resumed(psgd: CommandLine) -> None:
    raylet = str(Path(ray.__file__).parent / "core" / "src" / "ray" / "raylet" / "raylet")
    run = psgd.folder / "runs" / "digits"
    options = ("--set", "checkpoint.every_updates=200")
    with psgd.started("train", DIGITS, "--json", "--set", "run.epochs=100000", *options) as driver:
        eventually(lambda: recorded(run, "checkpoint"))
        (killed,) = ray_processes(raylet, psgd.environment["RAY_TMPDIR"])
        os.kill(killed, signal.SIGKILL)
        out, stderr = driver.communicate(timeout=2 * LIMIT_S)
    assert driver.returncode == 3, stderr
    assert "Traceback" not in stderr
    result = json.loads(out)
    assert result["status"] == "failed"
    assert "the cluster is gone" in result["error"]
    assert "--resume continues" in result["error"]
    assert "the newest checkpoint contains" in result["error"]
    assert json.loads((run / "result.json").read_text()) == result
    eventually(lambda: not psgd.processes())


def test_a_ray_that_does_not_start_is_told_in_one_sentence(psgd: CommandLine) -> None:
    deep = Path(psgd.environment["RAY_TMPDIR"]) / ("deep" * 30)  # longer than the path of a Unix socket may be
    failed = psgd.run("train", DIGITS, RAY_TMPDIR=str(deep))
    assert failed.returncode == 3, failed.stderr
    assert failed.stderr.startswith("psgd: Ray did not start on this machine: ")
    assert f"{deep}/ray/session_latest/logs" in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert not (psgd.folder / "runs" / "digits").exists()


MODEL = """
from psgd_workers.models.numpy.network import Network

def build():
    return Network((64, 10), "cross_entropy")
"""


def test_a_model_that_only_the_driver_can_import_fails_the_run_once(psgd: CommandLine) -> None:
    """Train a model whose module deletes itself when the driver imports it."""
    (psgd.folder / "ours.py").write_text(f"{MODEL}\nimport os\nos.unlink(__file__)\n")
    options = ("--set", "model={kind: python, path: 'ours:build'}", "--set", "run.epochs=1")
    failed = psgd.run("train", DIGITS, *options, PYTHONDONTWRITEBYTECODE="1", PYTHONPATH=with_path(psgd))
    assert failed.returncode == 3, failed.stderr
    assert "could not begin to work on its machine" in failed.stderr
    assert "No module named 'ours'" in failed.stderr
    run = psgd.folder / "runs" / "digits"
    assert recorded(run, "worker_lost")[0]["died"] is False
    assert len(recorded(run, "worker_started")) == 2  # the two workers of the job, each started once


def with_path(psgd: CommandLine) -> str:
    """Return a PYTHONPATH that begins with the command's folder."""
    return os.pathsep.join([str(psgd.folder), *filter(None, [psgd.environment.get("PYTHONPATH")])])
