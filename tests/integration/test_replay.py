"""Replays of runs on a real local Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import psgd
from psgd.cluster.server_actor import LONG_RUN
from psgd.replay.replay import Replay, replay
from psgd.store.run_directory import RunDirectory
from psgd.store.storage import Storage
from tests.support.command_line import recorded
from tests.support.digits_run import DATA
from tests.support.server_harness import IS_COMPILED

pytestmark = pytest.mark.usefixtures("local_ray")

BATCHES = 45  # ceil(1438 / 32)


def job(tmp_path: Path, **changes: Any) -> psgd.JobSpec:
    """Return a job of two asynchronous workers on digits, saved every 40 updates; `changes` replace sections."""
    tree: dict[str, Any] = {
        "name": "run",
        "model": {"kind": "mlp", "hidden": [32]},
        "data": DATA,
        "optimizer": {"lr": 0.1, "momentum": 0.5},
        "scaling": {"workers": 2},
        "checkpoint": {"every_s": None, "every_updates": 40, "keep": 1},
        "run": {"epochs": 6, "storage": str(tmp_path)},
    }
    return psgd.JobSpec.model_validate(tree | changes)


def replayed(result: psgd.Result) -> Replay:
    """Replay the run of a result."""
    return replay(RunDirectory(Storage(result.path)))


def test_an_asynchronous_run_comes_out_bit_for_bit(tmp_path: Path) -> None:
    result = psgd.train(job(tmp_path), progress=False)
    again = replayed(result)
    assert (again.agrees, again.tensor, again.updates) == (True, None, 6 * BATCHES), str(again)
    assert (again.checkpoint, again.incarnations) == (result.checkpoint, 1)
    assert len(list(Path(result.path, "journal").iterdir())) > len(list(Path(result.path, "checkpoints").iterdir()))


@pytest.mark.skipif(not IS_COMPILED, reason="the push path is not compiled")
@pytest.mark.parametrize("lane", ["shm", "tcp"])
@pytest.mark.usefixtures("compiled_code")  # so that the run does not wait until it is compiled
def test_a_run_served_in_compiled_code_comes_out_bit_for_bit(tmp_path: Path, lane: str) -> None:
    epochs = 2 * LONG_RUN // BATCHES
    sections = {"scaling": {"workers": 2, "lane": lane}, "run": {"epochs": epochs, "storage": str(tmp_path)}}
    result = psgd.train(job(tmp_path, checkpoint={"every_s": None}, **sections), progress=False)
    compiled = result.metrics["perf/compiled"]
    assert compiled is not None
    assert 0.3 < compiled < 1, "Python serves until the code is loaded, and the ends of epochs"
    again = replayed(result)
    assert (again.agrees, again.tensor, again.updates) == (True, None, epochs * BATCHES), str(again)


@pytest.mark.parametrize("lane", ["shm", "tcp", "ray"])
def test_slots_of_a_pipeline_on_several_servers_come_out_bit_for_bit(tmp_path: Path, lane: str) -> None:
    """Check that every lane carries a push's number, its slot and the versions of all partitions."""
    scaling = {"workers": 2, "servers": 2, "pipeline": 1, "lane": lane}
    result = psgd.train(job(tmp_path, scaling=scaling, compression={"name": "top_k", "ratio": 0.05}), progress=False)
    again = replayed(result)
    assert (again.agrees, again.tensor, again.updates) == (True, None, 6 * BATCHES), str(again)


@pytest.mark.parametrize(
    "sections",
    [
        {"consistency": {"mode": "bsp"}},
        {"compression": {"name": "top_k", "ratio": 0.05}},
        {"correction": {"name": "dana", "momentum": 0.5}, "optimizer": {"lr": 0.1}},
    ],
    ids=["bsp", "top_k", "dana"],
)
def test_a_resumed_run_comes_out_without_the_branch_it_gave_up(tmp_path: Path, sections: dict[str, Any]) -> None:
    sections |= {"checkpoint": {"every_s": None}}  # one checkpoint, at the end of each process
    first, second = (
        psgd.train(job(tmp_path, run={"epochs": n, "storage": str(tmp_path)}, **sections), resume=n > 1, progress=False)
        for n in (1, 2)
    )
    (Path(second.path) / "checkpoints" / str(second.checkpoint) / "server-0.safetensors").unlink()
    third = psgd.train(job(tmp_path, **sections), resume=True, progress=False)
    again = replayed(third)
    assert (again.agrees, again.incarnations, again.updates) == (True, 2, third.updates), str(again)
    resumed = [line["resumed"] for line in recorded(Path(third.path), "started")]
    assert resumed == [None, first.checkpoint, first.checkpoint]
