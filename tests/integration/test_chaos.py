"""Random kills on a real local Ray, while MNIST is trained: they may change nothing but the time it takes."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import psgd
from tests.support.command_line import eventually
from tests.support.disturbed import BATCHES, assert_as_if_undisturbed, job
from tests.support.killer import Killer, one_of, processes

SERVER = "ray::ServerActor"
WORKER = "ray::WorkerActor"
SECONDS = 0.008  # of a gradient
LEFT_S = 60.0  # a run may take so much longer than the kills do


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
        return one_of(processes(SERVER, str(local_ray)), rng)

    def a_worker(rng: random.Random) -> bool:
        return one_of(processes(WORKER, str(local_ray)), rng)

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
    eventually(lambda: not processes(SERVER, str(local_ray)) and not processes(WORKER, str(local_ray)))
