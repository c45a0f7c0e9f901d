"""Every lane, several servers and a pipeline on a real local Ray."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import psgd
from psgd.errors import RunFailedError
from tests.support.command_line import LIMIT_S, eventually, recorded
from tests.support.digits_run import DATA, ENDLESS, stop_after_epochs, training

pytestmark = pytest.mark.usefixtures("local_ray")

BATCHES = 45
EXAMPLES = 1438
EPOCHS = 4


def job(tmp_path: Path, epochs: int = EPOCHS, **scaling: Any) -> psgd.JobSpec:
    return psgd.JobSpec.model_validate(
        {
            "name": "run",
            "model": {"kind": "mlp", "hidden": [16]},
            "data": DATA,
            "optimizer": {"lr": 0.1, "momentum": 0.5},
            "scaling": {"workers": 2} | scaling,
            "run": {"epochs": epochs, "storage": str(tmp_path)},
        }
    )


def shared_memory() -> set[str]:
    """Return psgd's shared-memory files that are open in this process and its descendants."""
    found: set[str] = set()
    for files in Path("/proc").glob("[0-9]*/fd"):
        with suppress(OSError):  # the process has ended
            if os.getpid() in ancestors(int(files.parent.name)):
                found |= {str(file) for file in files.iterdir() if file.readlink().name.startswith("memfd:psgd")}
    return found


def ancestors(process: int) -> list[int]:
    """Return a process and its ancestors, the process first."""
    found = [process]
    while found[-1] > 1:
        stat = Path("/proc", str(found[-1]), "stat").read_text()
        found.append(int(stat.rpartition(")")[2].split()[1]))
    return found


def trained(tmp_path: Path, **scaling: Any) -> list[str]:
    """Train, check that every batch was applied once, and return the lanes by which each worker reached the servers."""
    result = psgd.train(job(tmp_path, **scaling), progress=False)
    assert (result.status, result.updates, result.samples) == ("finished", EPOCHS * BATCHES, EPOCHS * EXAMPLES)
    assert result.ledger.applied == EPOCHS * BATCHES
    assert (result.metrics["val/accuracy"] or 0) > 0.8
    assert set(psgd.load_weights(result.path)) == {
        f"layers.{number}.{name}" for number in (0, 1) for name in ("weight", "bias")
    }
    lanes = {tuple(event["lanes"]) for event in recorded(tmp_path / "run", "worker_up")}
    assert len(lanes) == 1
    return list(lanes.pop())


def test_auto_takes_shared_memory_on_one_node(tmp_path: Path) -> None:
    assert trained(tmp_path) == ["shm"]


def test_shared_memory_is_gone_with_its_run(tmp_path: Path) -> None:
    with training(job(tmp_path, epochs=ENDLESS)) as under_way:
        eventually(shared_memory)
        stop_after_epochs(tmp_path / "run")
        assert under_way.result(LIMIT_S).status == "stopped"
    eventually(lambda: not shared_memory())  # Ray ends processes with a delay


@pytest.mark.parametrize("lane", ["tcp", "ray"])
def test_two_servers_are_reached_by_the_lane_that_the_job_names(tmp_path: Path, lane: str) -> None:
    assert trained(tmp_path, lane=lane, servers=2) == [lane, lane]


def test_a_pipeline_over_two_servers_is_exact_too(tmp_path: Path) -> None:
    assert trained(tmp_path, servers=2, pipeline=2) == ["shm", "shm"]


def test_ports_that_are_all_taken_end_the_run_with_what_to_do(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        port = taken.getsockname()[1]
        with pytest.raises(RunFailedError, match=rf"no port from {port} to {port} is free .* widen scaling.ports"):
            psgd.train(job(tmp_path, ports=(port, port)), progress=False)
