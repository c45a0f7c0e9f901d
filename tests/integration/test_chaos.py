"""Random kills on a real local Ray, while MNIST is trained: they may change nothing but the time it takes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import psgd
from tests.integration.commands import eventually
from tests.integration.killer import Killer, processes

SERVER, WORKER = "ray::ServerActor", "ray::WorkerActor"
BATCHES, EXAMPLES = 469, 60_000
SECONDS = 0.008  # of a gradient
LEFT_S = 60.0  # a run may take so much longer than the kills do


def job(tmp_path: Path, mnist_file: Path, epochs: int, seconds: float) -> psgd.JobSpec:
    """Two workers, two servers."""
    tree: dict[str, Any] = {
        "model": {"kind": "python", "path": "tests.integration.faulty:mnist", "kwargs": {"seconds": seconds}},
        "data": {"format": "npz", "path": str(mnist_file), "batch_size": 128, "normalize": "unit"},
        "optimizer": {"lr": 0.1},
        "scaling": {"workers": 2, "servers": 2},
        "run": {"epochs": epochs, "storage": str(tmp_path)},
        "checkpoint": {"every_s": 2.0},
        "failure": {"max_failures": -1},
    }
    return psgd.JobSpec.model_validate(tree)


@pytest.mark.parametrize(
    ("epochs", "kills"),
    [
        pytest.param(8, 4, marks=pytest.mark.timeout(240)),
        pytest.param(100, 60, marks=[pytest.mark.chaos, pytest.mark.timeout(1800)]),
    ],
)
def test_kills_at_random_change_nothing_but_the_time(
    tmp_path: Path, local_ray: Path, mnist_file: Path, epochs: int, kills: int
) -> None:
    undisturbed = psgd.train(job(tmp_path, mnist_file, epochs, 0.0), name="undisturbed", progress=False)
    killer = Killer(str(local_ray), (SERVER, WORKER, WORKER), (3.0, 7.0), kills, seed=0)
    with ThreadPoolExecutor(1) as pool:
        spec = job(tmp_path, mnist_file, epochs, SECONDS)
        under_way = pool.submit(psgd.train, spec, name="disturbed", progress=False)
        with killer.at_work():
            result = under_way.result(7.0 * kills + epochs * BATCHES * SECONDS + LEFT_S)
    assert (result.status, result.epochs, result.samples) == ("finished", epochs, epochs * EXAMPLES)
    assert result.ledger.batches == result.ledger.applied == epochs * BATCHES
    assert result.failures
    assert killer.killed
    expected, found = (one.metrics["val/accuracy"] for one in (undisturbed, result))
    assert expected is not None
    assert found is not None
    assert expected > 0.93
    assert abs(found - expected) < 0.01
    eventually(lambda: not processes(SERVER, str(local_ray)) and not processes(WORKER, str(local_ray)))
