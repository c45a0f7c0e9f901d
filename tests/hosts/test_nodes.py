"""Runs whose hosts are lost, or whose cables are cut or slow."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Event
from typing import Any

import pytest

import psgd
from tests.support.command_line import LIMIT_S, eventually, recorded
from tests.support.digits_run import ENDLESS, assert_exactly_once, assert_stopped_exactly, job, stop_after_epochs
from tests.support.hosts_run import SERVER, WORKER, WORKERS, training
from tests.support.namespaces import Host
from tests.support.nodes import Nodes

# Three nodes take half a minute to start while other tests run.
pytestmark = pytest.mark.timeout(240)


def job_on_hosts(tmp_path: Path, epochs: int, servers: int = 1, **sections: Any) -> psgd.JobSpec:
    """Return the job on digits with one worker on each host."""
    return job(tmp_path, epochs, scaling={"workers": WORKERS, "servers": servers}, **sections)


def hosts_running(nodes: Nodes, prefix: str) -> list[Host]:
    """Return the hosts that run a process whose command line begins with `prefix`."""
    return [host for host in nodes.hosts if host.processes(prefix)]


def wait_until_training(nodes: Nodes, run: Path) -> None:
    """Wait until all workers are up and a checkpoint is committed."""
    workers = len(nodes.hosts)
    eventually(lambda: len(recorded(run, "worker_up")) == workers and recorded(run, "checkpoint"), LIMIT_S)


def committed_after(run: Path, event: str) -> list[int]:
    """Return the incarnation of each checkpoint that was committed after the first event of a kind."""
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    since = next(number for number, line in enumerate(lines) if line["event"] == event)
    return [int(line["name"].rpartition("-")[2]) for line in lines[since:] if line["event"] == "checkpoint"]


@pytest.mark.chaos
def test_undisturbed_workers_reach_a_server_on_another_host_by_tcp(nodes: Nodes, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with training(nodes, job_on_hosts(tmp_path, ENDLESS)) as future:
        wait_until_training(nodes, run)
        (serving,) = hosts_running(nodes, SERVER)
        local = serving.processes(WORKER)
        stop_after_epochs(run)
        ended = future.result()
    assert_stopped_exactly(ended)
    assert ended.failures == {}
    lanes = {int(up["process"].rpartition(":")[2]): up["lanes"] for up in recorded(run, "worker_up")}
    assert {process for process, lane in lanes.items() if lane == ["shm"]} == set(local)
    assert sorted(lanes.values()) == [["shm"], ["tcp"], ["tcp"]]


@pytest.mark.chaos
def test_a_workers_host_that_is_lost_costs_no_batch(nodes: Nodes, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with training(nodes, job_on_hosts(tmp_path, ENDLESS)) as future:
        wait_until_training(nodes, run)
        next(host for host in nodes.hosts[1:] if not host.processes(SERVER)).kill()
        eventually(lambda: any(recorded(run, lost) for lost in ("worker_lost", "worker_stopped")), LIMIT_S)
        stop_after_epochs(run)
        ended = future.result()
    assert_stopped_exactly(ended)
    assert sum(ended.failures.values()) == 1


def test_a_servers_host_that_is_lost_is_made_good_on_another(nodes: Nodes, tmp_path: Path) -> None:
    """Kill a host with one of two servers, which Ray spreads; the host's worker is lost, too."""
    run = tmp_path / "run"
    with training(nodes, job_on_hosts(tmp_path, ENDLESS, servers=2)) as future:
        wait_until_training(nodes, run)
        next(host for host in nodes.hosts[1:] if host.processes(SERVER)).kill()
        eventually(lambda: recorded(run, "server_restored") and recorded(run, "worker_lost"), LIMIT_S)
        stop_after_epochs(run)
        ended = future.result()
    assert_stopped_exactly(ended)
    lost = len(recorded(run, "server_lost"))
    assert lost in (1, 2)
    # Workers that only waited for a server are not given up.
    assert ended.failures == {"server_lost": lost, "worker_lost": 1}
    assert set(committed_after(run, "server_lost")) == {1 + lost}


@pytest.mark.chaos
def test_a_cable_that_is_cut_for_five_seconds_is_waited_for(nodes: Nodes, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with training(nodes, job_on_hosts(tmp_path, ENDLESS, servers=2)) as future:
        wait_until_training(nodes, run)
        cut = next(host for host in nodes.hosts[1:] if host.processes(SERVER))
        cut.cut()
        Event().wait(5.0)
        cut.heal()
        stop_after_epochs(run)
        ended = future.result()
    assert_stopped_exactly(ended)
    assert "server_lost" not in ended.failures


@pytest.mark.chaos
def test_a_slow_cable_only_takes_time(nodes: Nodes, tmp_path: Path) -> None:
    """Train over 10 Mbit/s, where a push and its weights (0.3 MB) take 0.25 s, and a gradient 2 ms."""
    for host in nodes.hosts[1:]:
        host.slow("10mbit")
    model = {"kind": "mlp", "hidden": [512]}
    with training(nodes, job_on_hosts(tmp_path, 3, model=model)) as future:
        ended = future.result()
    assert_exactly_once(ended, 3)
    assert ended.failures == {}


@pytest.mark.chaos
@pytest.mark.timeout(300)
@pytest.mark.parametrize("side", ["server", "worker"])
def test_who_is_cut_off_for_a_minute_is_replaced_and_changes_nothing(nodes: Nodes, tmp_path: Path, side: str) -> None:
    """Cut a server off that continues with a worker on its host, or a worker that comes back with a push."""
    run = tmp_path / "run"
    servers = 2 if side == "server" else 1
    model = {"kind": "python", "path": "tests.support.faulty_models:slow", "kwargs": {"seconds": 0.03}}
    with training(nodes, job_on_hosts(tmp_path, ENDLESS, servers, model=model), limit_s=250.0) as future:
        wait_until_training(nodes, run)
        cut = next(host for host in nodes.hosts[1:] if bool(host.processes(SERVER)) == (side == "server"))
        cut.cut()
        Event().wait(60.0)
        cut.heal()
        eventually(lambda: not cut.processes(SERVER) and not cut.processes(WORKER), LIMIT_S)
        nodes.repair()
        eventually(lambda: len(recorded(run, "worker_up")) > len(nodes.hosts), LIMIT_S)
        stop_after_epochs(run)
        ended = future.result()
    assert_stopped_exactly(ended)
    lost = len(recorded(run, "server_lost"))
    assert lost in ((1, 2) if side == "server" else (0,))
    if lost:
        assert set(committed_after(run, "server_lost")) == {1 + lost}
