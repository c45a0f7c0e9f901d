"""Workers, servers and whole hosts killed at random while MNIST is trained on three hosts."""

from __future__ import annotations

import random
from pathlib import Path
from threading import Event

import pytest

from tests.support.command_line import LIMIT_S, eventually
from tests.support.hosts_run import SERVER, WORKER, WORKERS, training
from tests.support.killer import Killer, kill_one
from tests.support.mnist_run import assert_as_if_undisturbed, job
from tests.support.nodes import Nodes

EPOCHS = 80
SECONDS = 0.02  # sleep before each gradient
RUN_S = 1200.0
OFF_S = (1.0, 20.0)  # some shorter, some longer than the time in which Ray notices a lost host


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_kills_of_workers_servers_and_hosts_change_nothing_but_the_time(
    nodes: Nodes, tmp_path: Path, mnist_file: Path
) -> None:
    def a_server(rng: random.Random) -> bool:
        return kill_one([process for host in nodes.hosts for process in host.processes(SERVER)], rng)

    def a_worker(rng: random.Random) -> bool:
        return kill_one([process for host in nodes.hosts for process in host.processes(WORKER)], rng)

    def a_host(rng: random.Random) -> bool:
        """Kill any host but the head, which runs the driver."""
        rng.choice(nodes.hosts[1:]).kill()
        Event().wait(rng.uniform(*OFF_S))
        nodes.repair()
        return True

    scaling = {"workers": WORKERS, "servers": 2}
    with training(nodes, job(tmp_path, mnist_file, EPOCHS, 0.0, scaling=scaling, name="undisturbed"), RUN_S) as future:
        undisturbed = future.result()
    ways = {"server": a_server, "worker": a_worker, "host": a_host}
    killer = Killer(ways, (1, 1, 1), (3.0, 10.0), times=1000, seed=0)
    with (
        training(nodes, job(tmp_path, mnist_file, EPOCHS, SECONDS, scaling=scaling, name="disturbed"), RUN_S) as future,
        killer.at_work(),
    ):
        result = future.result()
    assert set(killer.killed) == set(ways)
    lost = {"server_lost", "worker_lost"}
    assert (
        lost <= result.failures.keys() <= lost | {"worker_silent"}
    )  # a lost host may look like a silent worker at first
    assert_as_if_undisturbed(result, undisturbed, EPOCHS)
    eventually(lambda: not any(host.processes(name) for host in nodes.hosts for name in (SERVER, WORKER)), LIMIT_S)
