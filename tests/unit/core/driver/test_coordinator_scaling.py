"""Whole runs of the coordinator: the number of workers changes during the run."""

from __future__ import annotations

from typing import Any

import pytest

from psgd.core.driver.events import Finish, Scale, StartWorker, StopWorker
from psgd_workers.messages import EpochGrid
from tests.support.coordinator_runs import assert_exactly_once, run, speeds
from tests.support.in_process import START_S, EachStep


@pytest.mark.parametrize("workers", [3, {"min": 3, "max": 4}])
@pytest.mark.parametrize("mode", ["async", "bsp"])
@pytest.mark.parametrize("at", [START_S / 2, START_S + 0.1])
def test_a_run_scaled_down_before_all_are_up_begins_with_those_left(mode: str, workers: Any, at: float) -> None:
    host = run(
        mode,
        scaling={"workers": workers},
        start_s=lambda worker: START_S if worker == "worker-0" else 2 * START_S,
        events=[(at, Scale(1))],
    )
    assert host.finish == Finish("finished")
    assert_exactly_once(host, 1)
    assert len(host.did(StartWorker)) == 3 + (workers != 3)


def test_scaled_down_the_run_goes_on_with_fewer_and_up_with_more() -> None:
    grid = EpochGrid((300,), 300)
    counts: list[tuple[float, int]] = []
    host = run(
        workers=4,
        grid=grid,
        events=[(2.0, Scale(1)), (5.0, Scale(3))],
        observers=[EachStep(lambda cluster: counts.append((cluster.now, len(cluster.workers))))],
        failure={"max_failures": 0},
    )
    assert host.finish == Finish("finished")
    assert_exactly_once(host, 1, grid)
    assert {number for at, number in counts if 2.2 < at < 5} == {1}
    assert {number for at, number in counts if at > 5.1} == {3}
    assert {stopped.worker for _, stopped in host.did(StopWorker)} == {"worker-1", "worker-2", "worker-3"}


@pytest.mark.parametrize("mode", ["async", "bsp"])
def test_a_draining_worker_finishes_its_batch(mode: str) -> None:
    host = run(mode, workers=3, events=[(2.01, Scale(1))], compute_s=speeds(3))
    assert_exactly_once(host, 1)
    assert host.status.ledger.duplicates == 0
    assert host.status.charged_failures == 0
