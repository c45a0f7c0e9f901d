"""What becomes of a run when a host is gone, or a cable is cut or slow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import yaml

import psgd
from psgd.result import LedgerCounts
from tests.cluster.network import Host, missing, network
from tests.cluster.nodes import Nodes
from tests.integration.commands import LIMIT_S, CommandLine, eventually, recorded
from tests.integration.digits import assert_exactly_once, job

LACKING = missing()
# Three nodes take half a minute to start where other tests run beside them.
pytestmark = [pytest.mark.skipif(LACKING is not None, reason=str(LACKING)), pytest.mark.timeout(240)]

SERVER, WORKER = "ray::ServerActor", "ray::WorkerActor"
# One worker on each of three hosts; a host that is lost takes its worker's place along until it is back.
WORKERS = {"min": 2, "max": 3}
RUN_S = 180.0


@pytest.fixture(scope="module")
def cluster(ray_home: Path, environment: dict[str, str]) -> Iterator[Nodes]:
    with network(3) as hosts:
        nodes = Nodes(hosts, (1, 1, 1), ray_home, environment)
        nodes.start(hosts)
        yield nodes


@pytest.fixture
def nodes(cluster: Nodes) -> Nodes:
    """The cluster, which is whole again before the next test."""
    cluster.mend()
    return cluster


@contextmanager
def training(nodes: Nodes, spec: psgd.JobSpec, limit_s: float = RUN_S) -> Iterator[Future[psgd.Result]]:
    """A run under way, driven from the head."""
    folder = Path(spec.run.storage)
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(spec.model_dump(mode="json", exclude_unset=True)))
    command = CommandLine(nodes.environment, folder, nodes.head.inside, limit_s)

    def train() -> psgd.Result:
        done = command.run("train", str(file), "--address", nodes.address, "--json")
        assert done.returncode == 0, done.stderr
        told: dict[str, Any] = json.loads(done.stdout)
        return psgd.Result(**told | {"ledger": LedgerCounts(**told["ledger"])})

    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(train)


def slow_job(tmp_path: Path, epochs: int, servers: int = 1, **sections: Any) -> psgd.JobSpec:
    return job(tmp_path, epochs, scaling={"workers": WORKERS, "servers": servers}, **sections)


def where(nodes: Nodes, prefix: str) -> list[Host]:
    """The hosts that such processes are on."""
    return [host for host in nodes.hosts if host.processes(prefix)]


def under_way(nodes: Nodes, run: Path) -> None:
    """Wait until all workers work and something is saved."""
    everybody = len(nodes.hosts)
    eventually(lambda: len(recorded(run, "worker_up")) == everybody and recorded(run, "checkpoint"), LIMIT_S)


def committed_after(run: Path, event: str) -> list[int]:
    """By which incarnations, the present process's successors included, checkpoints were committed since an event."""
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    since = next(number for number, line in enumerate(lines) if line["event"] == event)
    return [int(line["name"].rpartition("-")[2]) for line in lines[since:] if line["event"] == "checkpoint"]


@pytest.mark.chaos
def test_undisturbed_workers_reach_a_server_on_another_host_by_tcp(nodes: Nodes, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with training(nodes, slow_job(tmp_path, 12)) as result:
        under_way(nodes, run)
        (serving,) = where(nodes, SERVER)
        local = serving.processes(WORKER)
        ended = result.result()
    assert_exactly_once(ended, 12)
    assert ended.failures == {}
    lanes = {int(up["process"].rpartition(":")[2]): up["lanes"] for up in recorded(run, "worker_up")}
    assert {process for process, lane in lanes.items() if lane == ["shm"]} == set(local)
    assert sorted(lanes.values()) == [["shm"], ["tcp"], ["tcp"]]


@pytest.mark.chaos
def test_a_workers_host_that_is_lost_costs_no_batch(nodes: Nodes, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with training(nodes, slow_job(tmp_path, 45)) as result:
        under_way(nodes, run)
        next(host for host in nodes.hosts[1:] if not host.processes(SERVER)).kill()
        ended = result.result()
    assert_exactly_once(ended, 45)
    assert sum(ended.failures.values()) == 1


def test_a_servers_host_that_is_lost_is_made_good_on_another(nodes: Nodes, tmp_path: Path) -> None:
    """Two servers are spread, so that one at least is not on the head; its host's worker is lost along with it."""
    run = tmp_path / "run"
    with training(nodes, slow_job(tmp_path, 20, servers=2)) as result:
        under_way(nodes, run)
        next(host for host in nodes.hosts[1:] if host.processes(SERVER)).kill()
        ended = result.result()
    assert_exactly_once(ended, 20)
    lost = len(recorded(run, "server_lost"))
    assert lost in (1, 2)
    assert ended.failures == {"server_lost": lost, "worker_lost": 1}  # nobody is given up who only waited for a server
    assert set(committed_after(run, "server_lost")) == {1 + lost}


@pytest.mark.chaos
def test_a_cable_that_is_cut_for_five_seconds_is_waited_for(nodes: Nodes, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with training(nodes, slow_job(tmp_path, 20, servers=2)) as result:
        under_way(nodes, run)
        cut = next(host for host in nodes.hosts[1:] if host.processes(SERVER))
        cut.cut()
        Event().wait(5.0)
        cut.heal()
        ended = result.result()
    assert_exactly_once(ended, 20)
    assert "server_lost" not in ended.failures


@pytest.mark.chaos
def test_a_slow_cable_only_takes_time(nodes: Nodes, tmp_path: Path) -> None:
    """At 10 Mbit/s a push and its weights, 0.3 MB, take 0.25 s, and a gradient 2 ms."""
    for host in nodes.hosts[1:]:
        host.slow("10mbit")
    model = {"kind": "mlp", "hidden": [512]}
    with training(nodes, slow_job(tmp_path, 3, model=model)) as result:
        ended = result.result()
    assert_exactly_once(ended, 3)
    assert ended.failures == {}


@pytest.mark.chaos
@pytest.mark.timeout(300)
@pytest.mark.parametrize("side", ["server", "worker"])
def test_who_is_cut_off_for_a_minute_is_replaced_and_changes_nothing(nodes: Nodes, tmp_path: Path, side: str) -> None:
    """On the wrong side a server goes on for a while, with a worker of its own; or a worker comes back with a push."""
    run, servers = tmp_path / "run", 2 if side == "server" else 1
    model = {"kind": "python", "path": "tests.integration.faulty:slow", "kwargs": {"seconds": 0.03}}
    with training(nodes, slow_job(tmp_path, 130, servers, model=model), limit_s=250.0) as result:
        under_way(nodes, run)
        cut = next(host for host in nodes.hosts[1:] if bool(host.processes(SERVER)) == (side == "server"))
        cut.cut()
        Event().wait(60.0)
        cut.heal()
        eventually(lambda: not cut.processes(SERVER) and not cut.processes(WORKER), LIMIT_S)
        nodes.mend()
        eventually(lambda: len(recorded(run, "worker_up")) > len(nodes.hosts), LIMIT_S)
        ended = result.result()
    assert_exactly_once(ended, 130)
    lost = len(recorded(run, "server_lost"))
    assert lost in ((1, 2) if side == "server" else (0,))
    if lost:
        assert set(committed_after(run, "server_lost")) == {1 + lost}
