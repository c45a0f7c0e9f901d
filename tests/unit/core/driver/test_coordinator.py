"""The coordinator of one run: how a run starts, single events, and the actions that answer them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from psgd.core.driver.events import (
    AskReport,
    Finish,
    Reported,
    ServerLost,
    StartServer,
    StartWorker,
    Stop,
    StopWorker,
    Tick,
    WorkerLost,
)
from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.partitions import Partition
from psgd_workers.messages import EpochGrid, Version
from tests.support.coordinator_runs import GRID, SIZE, run, start, validate
from tests.support.in_process import START_S
from tests.support.jobs import START, job, push


def test_a_run_starts_its_server_asks_it_and_starts_its_workers() -> None:
    _, actions = start()
    assert [type(action) for action in actions] == [StartServer, AskReport, StartWorker, StartWorker]


@pytest.mark.parametrize("at", [0.0, 0.0005, 0.5, 1.0, 1.0005])
@pytest.mark.parametrize("status", ["stopped", "interrupted"])
def test_a_run_can_be_stopped_while_it_starts(at: float, status: Any) -> None:
    assert run(events=[(at, Stop(status))], evaluate=validate).finish == Finish(status)


def test_training_begins_with_the_least_that_there_must_be() -> None:
    late = {"worker-2": 3.0, "worker-3": float("inf")}
    host = run(
        scaling={"workers": {"min": 2, "max": 4}},
        start_s=lambda worker: late.get(worker, START_S),
        grid=EpochGrid((200,), 200),
        failure={"timeout_s": 2.0},
    )
    assert host.status.began == START_S
    assert host.did(StopWorker) == []  # the cluster may never have room for the fourth worker
    assert "worker-2" in {applied.worker for applied in host.applied}


def test_a_worker_that_cannot_be_built_fails_the_run_at_once() -> None:
    coordinator, _ = start()
    (finish,) = coordinator.handle(WorkerLost("worker-1", "ImportError: no my_model", died=False), 1.0)
    assert isinstance(finish, Finish)
    assert finish.status == "failed"
    assert "worker-1 could not begin to work on its machine" in str(finish.error)
    assert "ImportError: no my_model. Install the modules" in str(finish.error)


def test_a_worker_that_cannot_be_built_where_all_could_before_counts_as_a_death() -> None:
    unbuilt = WorkerLost("worker-1", "ImportError: no my_model", died=False)
    host = run(events=[(3.0, unbuilt)], run={"epochs": 3})
    assert host.finish == Finish("finished")
    assert host.status.failures == Counter({"worker_lost": 1})


def test_a_report_of_nothing_new_is_answered_with_the_next_question() -> None:
    host = run()
    coordinator, (_, ask, *_) = start()
    assert isinstance(ask, AskReport)
    report = replace(host.servers[0].report(), epochs=0, pushes={"rejected": 0})
    actions = coordinator.handle(Reported(report, ask.asked), 1.0)
    assert [type(action) for action in actions] == [AskReport]


def test_a_report_overtaken_on_its_way_takes_nothing_back() -> None:
    coordinator, (_, ask, *_) = start()
    assert isinstance(ask, AskReport)
    server = ParameterServer(job(), Partition(0, 0, 6, 6), START, GRID, Version(1, 0))
    coordinator.handle(Reported(server.report(), ask.asked), 0.5)
    server.push(push(GRID.batch(0, 0), server.version), now=1.0)
    older = server.report()
    for position in range(1, SIZE):
        server.push(push(GRID.batch(0, position), server.version), now=2.0)
    for report in (server.report(), older):
        coordinator.handle(Reported(report, ask.asked + 1), 3.0)
        status = coordinator.status(3.0)
        assert (status.epochs, status.updates, status.examples) == (1, SIZE, SIZE)


def test_finish_comes_alone_and_nothing_after_it() -> None:
    coordinator, _ = start()
    (finish,) = coordinator.handle(ServerLost(0, "no memory", died=False), 1.0)
    assert isinstance(finish, Finish)
    assert coordinator.handle(Tick(), 2.0) == ()
    assert coordinator.handle(Stop("stopped"), 2.0) == ()
