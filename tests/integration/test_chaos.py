"""Random kills on a real local Ray while MNIST is trained: only the duration may change."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import psgd
from tests.support.command_line import eventually
from tests.support.killer import Killer, kill_one, ray_processes
from tests.support.mnist_run import BATCHES, assert_as_if_undisturbed, job

SERVER = "ray::ServerActor"
WORKER = "ray::WorkerActor"
SECONDS = 0.008  # sleep before each gradient
LEFT_S = 60.0  # time limit of a run beyond that of its kills and gradients


@pytest.mark.parametrize(
    ("epochs", "kills"),
    [
        pytest.param(8, 4, marks=pytest.mark.timeout(240)),
        pytest.param(120, 70, marks=[pytest.mark.chaos, pytest.mark.timeout(1800)]),
    ],
)
def test_kills_at_random_change_nothing_but_the_time(
    tmp_path: Path, local_ray: Path, mnist_file: Path, epochs: int, kills: int
) -> None:
    def a_server(rng: random.Random) -> bool:
        return kill_one(ray_processes(SERVER, str(local_ray)), rng)

    def a_worker(rng: random.Random) -> bool:
        return kill_one(ray_processes(WORKER, str(local_ray)), rng)

    undisturbed = psgd.train(job(tmp_path, mnist_file, epochs, 0.0), name="undisturbed", progress=False)
    killer = Killer({"server": a_server, "worker": a_worker}, (1, 2), (3.0, 7.0), kills, seed=0)
    with ThreadPoolExecutor(1) as pool:
        spec = job(tmp_path, mnist_file, epochs, SECONDS)
        under_way = pool.submit(psgd.train, spec, name="disturbed", progress=False)
        with killer.at_work():
            result = under_way.result(7.0 * kills + epochs * BATCHES * SECONDS + LEFT_S)
    assert killer.killed
    assert result.failures
    assert_as_if_undisturbed(result, undisturbed, epochs)
    eventually(lambda: not ray_processes(SERVER, str(local_ray)) and not ray_processes(WORKER, str(local_ray)))
