from __future__ import annotations

from math import hypot
from typing import Any

import numpy as np
import pytest

from psgd.core.driver.events import Event, LeaseClosed
from psgd.simulation.cluster import VirtualCluster
from psgd.simulation.observer import ClusterObserver
from psgd.simulation.problem import Problem, Timing
from psgd_workers.gradients.compression import ErrorFeedback, TopK, decode
from psgd_workers.messages import BatchId, EpochGrid, FloatArray
from tests.support.jobs import START, job, quadratic

BATCHES = 14  # number of batches in one lease
GRID = EpochGrid((BATCHES,), BATCHES)
LR = np.float32(0.1)


def run(link_s: float = 0.0, weights: FloatArray = START, compute_s: float = 1.0, **sections: Any) -> VirtualCluster:
    problem = Problem(GRID, weights, quadratic)
    return VirtualCluster(job(**sections), problem, lambda worker, batch: compute_s, timing=Timing(link_s=link_s)).run()


def train_s(host: VirtualCluster) -> float:
    """Return the virtual seconds from the start of training to the last step, without the first lease's call."""
    last = host.servers[0].report().last
    assert last
    assert host.status.began is not None
    return last.now - host.status.began - host.timing.call_s


@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize("pipeline", [0, 1, 2])
def test_one_worker_is_a_loop_whose_gradients_are_as_many_steps_old_as_it_is_ahead(pipeline: int, servers: int) -> None:
    weights = START.copy()
    slots = [START.copy()] * (pipeline + 1)
    gradient = np.empty_like(START)
    for number in range(BATCHES):
        slot = number % (pipeline + 1)
        quadratic(BatchId(0, 0, number), weights if number <= pipeline else slots[slot], gradient)
        weights -= LR * gradient
        slots[slot] = weights.copy()
    host = run(scaling={"pipeline": pipeline, "servers": servers})
    np.testing.assert_array_equal(host.weights, weights)
    first = {0: pipeline + 1} if pipeline else {}
    for server in host.servers.values():
        assert server.report().staleness == first | {pipeline: BATCHES - (pipeline + 1 if pipeline else 0)}


def test_what_compression_leaves_out_stays_in_its_slot() -> None:
    weights = START.copy()
    slots = [START, START]
    gradient = np.empty_like(START)
    out = np.empty_like(START)
    memories = [ErrorFeedback(TopK(0.3), len(START)) for _ in slots]
    for number in range(BATCHES):
        slot = number % 2
        quadratic(BatchId(0, 0, number), weights if number < 2 else slots[slot], gradient)
        decode(memories[slot].encode(gradient), out)
        memories[slot].taken()
        weights -= LR * out
        slots[slot] = weights.copy()
    host = run(scaling={"pipeline": 1}, compression={"name": "top_k", "ratio": 0.3})
    np.testing.assert_array_equal(host.weights, weights)
    expected = hypot(*(memory.norm for memory in memories))
    assert host.status.residual_norm == pytest.approx(expected)


@pytest.mark.parametrize(
    ("pipeline", "link_s", "expected_s"),
    [
        (0, 0.5, BATCHES * 2.0),
        (1, 0.5, BATCHES * 1.0 + 1.0),  # the transfer is hidden behind the other batch
        (1, 1.5, BATCHES / 2 * 4.0 + 1.0),  # two batches in four seconds: the transfer is only half hidden
        (2, 1.0, BATCHES * 1.0 + 2.0),
    ],
)
def test_a_pipeline_hides_the_way_of_a_push(pipeline: int, link_s: float, expected_s: float) -> None:
    assert train_s(run(link_s, scaling={"pipeline": pipeline})) == pytest.approx(expected_s, abs=2 * link_s)


def test_a_lease_ends_when_every_push_is_answered() -> None:
    ended: list[int] = []

    class LeaseEnds(ClusterObserver):
        def event_received(self, cluster: VirtualCluster, event: Event) -> None:
            if isinstance(event, LeaseClosed):
                ended.append(cluster.servers[0].version.updates)

    spec = job(scaling={"pipeline": 2})
    timing = Timing(link_s=5.0)
    problem = Problem(GRID, START, quadratic)
    VirtualCluster(spec, problem, lambda worker, batch: 1.0, timing=timing, observers=[LeaseEnds()]).run()
    assert ended == [BATCHES]


@pytest.mark.parametrize(("interrupts", "expected"), [(False, [0, 9, 18]), (True, [0, 1, 2])])
def test_a_stale_computation_is_given_up_when_it_is_done_or_if_it_can_be_interrupted_at_once(
    interrupts: bool, expected: list[int]
) -> None:
    began: list[float] = []

    def compute_s(worker: str, batch: BatchId) -> float:
        if worker == "worker-1":
            began.append(host.now)
        return 9.0 if worker == "worker-1" else 1.0

    spec = job(workers=2, consistency={"mode": "ringmaster", "r": 1, "stop": True}, run={"epochs": 3})
    host = VirtualCluster(spec, Problem(GRID, START, quadratic), compute_s, timing=Timing(0.0, interrupts=interrupts))
    report = host.run().servers[0].report()
    assert [round(at - began[0]) for at in began[:3]] == expected
    assert (report.pushes["applied"], report.pushes["requeued"]) == (3 * BATCHES, 0)


@pytest.mark.parametrize("pipeline", [0, 2])
def test_a_worker_whose_server_is_gone_before_it_looks_begins_anew(pipeline: int) -> None:
    consistency = {"mode": "ringmaster", "r": 3, "stop": True}
    spec = job(consistency=consistency, scaling={"pipeline": pipeline}, failure={"max_failures": -1})
    host = VirtualCluster(spec, Problem(GRID, START, quadratic), lambda worker, batch: 1.0)
    host.after(3.5, host.kill_server, 0)
    report = host.run().servers[0].report()
    assert (report.version.incarnation, report.pushes["applied"]) == (2, BATCHES)


def test_servers_are_refused_that_would_hold_nothing() -> None:
    with pytest.raises(ValueError, match="servers is 7, but the model has 6 parameters"):
        run(scaling={"servers": 7})
