"""The worker's actor without Ray: a call returns a function, and the fake `ray.get` calls it."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import RayActorError

from psgd.cluster.worker_actor import WorkerActor
from psgd.core.context import RunContext
from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.partitions import partition_weights
from psgd.job import OpenJob
from psgd.spec import JobSpec
from psgd_workers.messages import BatchRange, FloatArray, Gradient, Lease, LeaseEnd, Receipt, Version
from tests.support.jobs import job

SERVERS = 2
LEASE = Lease(3, (BatchRange(0, 0, 5),))


class Server:
    """A fake server actor that hosts a real `ParameterServer`.

    Attributes:
        after_push: called after each push.
    """

    def __init__(self, opened: OpenJob, partition: int) -> None:
        found = partition_weights(opened.layout.num_parameters, opened.layout.num_trainable, SERVERS)[partition]
        part = opened.weights[found.start : found.stop]
        self.server = ParameterServer(opened.spec, found, part, opened.shards.grid, Version(1, 0))
        self.after_push: Callable[[], None] = lambda: None
        self.pull = SimpleNamespace(remote=lambda: lambda: (self.server.version, self.server.weights))
        self.push = SimpleNamespace(remote=lambda gradient, wants: lambda: self._push(gradient))

    def _push(self, gradient: Gradient) -> tuple[Receipt, FloatArray]:
        (receipt,) = self.server.push(gradient, now=1.0)
        self.after_push()
        return receipt, self.server.weights

    @property
    def updates(self) -> int:
        return self.server.version.updates


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> OpenJob:
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "node"))
    monkeypatch.setattr(ray, "get", lambda reply, timeout: reply())
    data = {"format": "sklearn", "dataset": "iris", "batch_size": 10, "validation_fraction": 0.2}
    return OpenJob.open(job(data=data, scaling={"lane": "ray", "servers": SERVERS}))


def start(opened: OpenJob, servers: list[Any], spec: JobSpec | None = None) -> Any:
    """Return a worker's actor, typed `Any`: in Ray's types, a method of a concurrency group is a handle."""
    partitions = partition_weights(opened.layout.num_parameters, opened.layout.num_trainable, SERVERS)
    context = RunContext(spec or opened.spec, opened.layout, opened.shards.grid, partitions, "driver", "nowhere")
    return WorkerActor(context, "worker-0", opened.dataset, servers)


def test_a_lease_is_worked_through_and_every_server_gets_its_slice(opened: OpenJob) -> None:
    servers = [Server(opened, partition) for partition in range(SERVERS)]
    end = start(opened, servers).work(LEASE)
    assert end == LeaseEnd(LEASE.id, stopped=False)
    assert [server.updates for server in servers] == [5, 5]
    lone = opened.worker("alone")
    weights = opened.weights.copy()
    gradient = np.empty_like(weights)
    for epoch, position in LEASE.positions():
        lone.gradient(opened.shards.grid.batch(epoch, position), weights, gradient)
        weights -= np.float32(opened.spec.optimizer.lr) * gradient
    assert np.concatenate([server.server.weights for server in servers]).tobytes() == weights.tobytes()


@pytest.mark.parametrize(("cancelled", "pushed"), [(LEASE.id, 2), (LEASE.id + 1, 2), (LEASE.id - 1, 5)])
def test_a_cancelled_lease_ends_after_the_batch_in_hand(opened: OpenJob, cancelled: int, pushed: int) -> None:
    servers = [Server(opened, partition) for partition in range(SERVERS)]
    actor = start(opened, servers)
    servers[-1].after_push = lambda: actor.cancel(cancelled) if servers[-1].updates == 2 else None
    assert actor.work(LEASE) == LeaseEnd(LEASE.id, stopped=pushed < 5)
    assert [server.updates for server in servers] == [pushed, pushed]


def test_an_older_cancellation_takes_nothing_back(opened: OpenJob) -> None:
    servers = [Server(opened, partition) for partition in range(SERVERS)]
    actor = start(opened, servers)
    actor.cancel(LEASE.id)
    actor.cancel(LEASE.id - 1)
    assert actor.work(LEASE).stopped
    assert servers[0].updates == 0


def test_a_partition_whose_server_was_replaced_is_worked_for_there(opened: OpenJob) -> None:
    old = [Server(opened, partition) for partition in range(SERVERS)]
    new = [Server(opened, partition) for partition in range(SERVERS)]
    actor = start(opened, list(old))
    actor.work(LEASE)
    actor.reroute(1, new[1])
    actor.work(Lease(4, (BatchRange(0, 5, 7),)))
    assert [server.updates for server in (*old, *new)] == [7, 5, 0, 2]


def test_it_says_where_it_runs_and_by_which_lanes(opened: OpenJob) -> None:
    actor = start(opened, [Server(opened, partition) for partition in range(SERVERS)])
    where, lanes = actor.ready()
    assert where.endswith(f":{os.getpid()}")
    assert lanes == ("ray", "ray")


def test_it_is_ready_though_a_server_cannot_be_reached_just_now(opened: OpenJob) -> None:
    def gone() -> None:
        raise RayActorError

    absent = SimpleNamespace(address=SimpleNamespace(remote=lambda: gone))
    spec = job(data=opened.spec.data.model_dump(), scaling={"lane": "auto", "servers": SERVERS})
    assert start(opened, [absent, absent], spec).ready()[1] == ()


def test_it_evaluates_the_parts_as_one_vector(opened: OpenJob) -> None:
    actor = start(opened, [])
    at = opened.layout.num_parameters // 3
    whole = opened.worker("judge").evaluate(opened.weights, opened.dataset.validation)  # type: ignore[arg-type]
    assert actor.evaluate(opened.weights[:at], opened.weights[at:]) == whole
    assert whole.examples == 30
