from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from psgd.core.driver.events import Action, Event, LaneFailed, Save, SaveFailed, WorkerLost
from psgd.simulation.cluster import VirtualCluster
from psgd.simulation.faults import Crashes, FaultPlan, PushFault
from psgd.simulation.observer import ClusterObserver
from psgd.simulation.problem import Problem
from psgd_workers.messages import BatchId, Gradient, Receipt, Version
from tests.support.jobs import GRID, START, job, quadratic

SIZE = GRID.num_batches


class Scripted(FaultPlan):
    """A plan with one fault, at one push of one worker.

    Attributes:
        pushes: (worker, number of the push) for each push that the plan was consulted about.
    """

    def __init__(self, worker: str, number: int, fault: PushFault) -> None:
        self._at = (worker, number)
        self._fault = fault
        self.pushes: list[tuple[str, int]] = []

    def push(self, worker: str, number: int, partitions: int) -> PushFault | None:
        self.pushes.append((worker, number))
        return self._fault if (worker, number) == self._at else None


class Recorder(ClusterObserver):
    """Records pushes, receipts and events."""

    def __init__(self) -> None:
        self.pushes: list[tuple[float, int, BatchId]] = []
        self.receipts = Counter[str]()
        self.events: list[Event] = []

    def pushed(self, cluster: VirtualCluster, partition: int, gradient: Gradient) -> None:
        self.pushes.append((cluster.now, partition, gradient.batch))

    def answered(self, cluster: VirtualCluster, partition: int, receipt: Receipt) -> None:
        self.receipts[receipt.outcome.value] += 1

    def event_received(self, cluster: VirtualCluster, event: Event) -> None:
        self.events.append(event)


def run(faults: FaultPlan, **sections: Any) -> tuple[VirtualCluster, Recorder]:
    recorder = Recorder()
    spec = job(workers=2, **sections)
    problem = Problem(GRID, START, quadratic)
    cluster = VirtualCluster(spec, problem, lambda worker, batch: 0.1, faults=faults, observers=[recorder]).run()
    assert cluster.finish
    assert cluster.finish.status == "finished"
    for server in cluster.servers.values():
        assert server.report().pushes["applied"] == SIZE  # in spite of the fault
    return cluster, recorder


def events(recorder: Recorder, kind: type[Event]) -> list[Any]:
    return [event for event in recorder.events if isinstance(event, kind)]


def test_without_faults_every_push_arrives_once_and_every_worker_is_asked_about_in_order() -> None:
    plan = Scripted("nobody", 0, PushFault([()]))
    _, recorder = run(plan)
    assert recorder.receipts == {"applied": SIZE}
    for worker in ("worker-0", "worker-1"):
        numbers = [number for name, number in plan.pushes if name == worker]
        assert numbers == list(range(len(numbers)))


@pytest.mark.parametrize(
    ("copies", "outcomes"),
    [
        ([(0.0, 0.3)], {"applied": SIZE, "duplicate": 1}),
        ([(0.15,)], {"applied": SIZE}),
        ([(0.0,)], {"applied": SIZE}),
    ],
)
def test_a_push_arrives_as_often_and_as_late_as_the_plan_says(
    copies: Sequence[Sequence[float]], outcomes: dict[str, int]
) -> None:
    _, recorder = run(Scripted("worker-0", 1, PushFault(copies)))
    assert recorder.receipts == outcomes


def test_a_push_that_is_lost_is_given_up_after_the_limit_and_done_again() -> None:
    plan = Scripted("worker-0", 1, PushFault([()]))
    plan.receipt_limit_s = 2.0
    _, recorder = run(plan)
    assert [event.cause for event in events(recorder, LaneFailed)] == ["no receipt in time"]
    assert recorder.receipts == {"applied": SIZE}


def test_a_push_may_reach_one_server_of_two_when_its_worker_dies() -> None:
    _, recorder = run(Scripted("worker-1", 0, PushFault([(0.0,), ()], "dies", "killed")), scaling={"servers": 2})
    (lost,) = events(recorder, WorkerLost)
    assert (lost.worker, lost.cause, lost.preempted) == ("worker-1", "killed", False)
    assert recorder.receipts["duplicate"] == 1  # the batch is computed again, and the first server refuses it


def test_a_worker_that_loses_its_lane_goes_on_with_its_next_lease() -> None:
    plan = Scripted("worker-0", 0, PushFault([(0.0,)], "loses its lane"))
    _, recorder = run(plan)
    assert [event.worker for event in events(recorder, LaneFailed)] == ["worker-0"]
    assert ("worker-0", 1) in plan.pushes
    assert {worker for worker, _ in plan.pushes} == {"worker-0", "worker-1"}


def test_a_worker_that_hangs_does_nothing_more() -> None:
    plan = Scripted("worker-0", 0, PushFault([()], "hangs"))
    _, recorder = run(plan, failure={"timeout_s": 3.0})
    assert [number for worker, number in plan.pushes if worker == "worker-0"] == [0]
    assert recorder.receipts == {"applied": SIZE}


def test_a_receipt_that_is_lost_leaves_the_batch_applied() -> None:
    class Lost(FaultPlan):
        receipt_limit_s = 2.0
        lost = 0

        def receipt(self, partition: int, receipt: Receipt) -> float | None:
            self.lost += 1
            return None if self.lost == 3 else 0.0

    cluster, recorder = run(Lost())
    assert len(events(recorder, LaneFailed)) == 1
    assert cluster.status.ledger.requeued == 0


def test_a_link_that_is_cut_lets_no_weights_through() -> None:
    class Cut(FaultPlan):
        def begin(self, cluster: VirtualCluster) -> None:
            self.cluster = cluster

        def reaches(self, worker: str, partition: int) -> bool:
            return worker != "worker-0" or self.cluster.now > 1.5

    _, recorder = run(Cut())
    assert {event.cause for event in events(recorder, LaneFailed)} == {"no weights came"}


def test_a_push_that_a_server_refuses_ends_its_lane() -> None:
    """A restored server may be epochs behind the others, and then refuses batches of later epochs."""
    problem = Problem(GRID, START, quadratic)
    recorder = Recorder()

    class Foreign(FaultPlan):
        def begin(self, cluster: VirtualCluster) -> None:
            self.cluster = cluster

        def push(self, worker: str, number: int, partitions: int) -> PushFault | None:
            if (worker, number) == ("worker-0", 2):  # the server now has another grid, without this batch
                server = self.cluster.servers[0]
                self.real = server._push_check._grid
                server._push_check._grid = type(GRID)((1,), 1)
                self.cluster.after(0.05, setattr, server._push_check, "_grid", self.real)
            return None

    cluster = VirtualCluster(
        job(workers=2), problem, lambda worker, batch: 0.1, faults=Foreign(), observers=[recorder]
    ).run()
    assert [event.worker for event in events(recorder, LaneFailed)][:1] == ["worker-0"]
    assert cluster.servers[0].report().pushes["applied"] == SIZE


def test_an_action_that_the_plan_does_not_allow_is_seen_and_not_carried_out() -> None:
    class Full(FaultPlan):
        refused = 0

        def begin(self, cluster: VirtualCluster) -> None:
            self.cluster = cluster

        def allows(self, action: Action) -> bool:
            if isinstance(action, Save) and not self.refused:
                self.refused += 1
                self.cluster.tell_soon(SaveFailed(action.checkpoint, "the disk is full"))
                return False
            return True

    plan = Full()
    cluster, recorder = run(plan)
    assert plan.refused == 1
    assert len(events(recorder, SaveFailed)) == 1
    assert cluster.checkpoint is not None


def test_crashes_kill_workers_while_they_train() -> None:
    times = iter((0.5, 0.6, 0.5, *[1e9] * 9))
    cluster, recorder = run(Crashes(lambda: next(times), seed=1))
    lost = events(recorder, WorkerLost)
    assert len(lost) >= 1
    assert cluster.status.charged_failures == len(lost)
    assert np.isfinite(cluster.weights).all()
    assert cluster.servers[0].version == Version(1, SIZE)


def test_a_driver_that_is_killed_ends_with_everything_it_started() -> None:
    class Dies(FaultPlan):
        def begin(self, cluster: VirtualCluster) -> None:
            cluster.after(1.2, cluster.kill_driver)

    cluster = VirtualCluster(
        job(workers=2), Problem(GRID, START, quadratic), lambda worker, batch: 0.1, faults=Dies()
    ).run()
    assert cluster.dead
    assert cluster.finish is None
