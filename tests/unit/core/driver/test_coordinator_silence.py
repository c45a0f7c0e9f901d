"""Whole runs of the coordinator: workers that hang, or never start."""

from __future__ import annotations

import pytest

from psgd.core.driver.events import Commit, Finish, Paused, StopWorker, Tick, WorkerLost
from psgd.core.driver.workers import LEAST_SILENCE_TIMEOUT_S
from psgd.simulation.problem import Timing
from psgd_workers.messages import EpochGrid
from tests.support.coordinator_runs import assert_exactly_once, notes, run, run_killing, start
from tests.support.in_process import START_S, Fault
from tests.support.jobs import job


@pytest.mark.parametrize("mode", ["async", "bsp"])
def test_a_silent_worker_is_given_up_after_the_time_limit(mode: str) -> None:
    grid = EpochGrid((200,), 200)
    host = run(mode, grid=grid, faults=[Fault("worker-0", 3, "silent")], failure={"timeout_s": 4.0})
    (at, stopped), *others = host.did(StopWorker)
    assert (stopped.worker, others) == ("worker-0", [])
    last_life = START_S + 3 * 0.05
    assert last_life + 4 <= at <= last_life + 4 + 0.3
    assert "failure.timeout_s" in stopped.cause
    assert host.status.charged_failures == 1


def test_a_silent_worker_is_given_up_although_epochs_are_short() -> None:
    """At each epoch's end, the server makes the workers' clocks equal. That is no sign of life."""
    host = run(
        grid=EpochGrid((4, 4), 8),
        faults=[Fault("worker-0", 9, "silent")],
        failure={"timeout_s": 4.0},
        run={"epochs": 400},
    )
    assert [stopped.worker for _, stopped in host.did(StopWorker)] == ["worker-0"]
    assert host.did(StopWorker)[0][0] <= START_S + 9 * 0.05 + 4 + 0.5


def test_time_in_which_the_driver_was_paused_is_not_a_workers_silence() -> None:
    coordinator, _ = start()
    limits = job().failure
    late = limits.start_timeout_s + limits.timeout_s + 1.0
    assert not any(isinstance(action, StopWorker) for action in coordinator.handle(Paused(late - 0.5), late))
    assert [worker.silent_s for worker in coordinator.status(late).workers] == [0.5, 0.5]
    stopped = [action for action in coordinator.handle(Tick(), 2 * late) if isinstance(action, StopWorker)]
    assert [action.worker for action in stopped] == ["worker-0", "worker-1"]


def test_whoever_pushes_often_is_given_up_sooner() -> None:
    """The timeout is a multiple of the longest batch, once the worker has pushed."""
    grid = EpochGrid((300,), 300)
    host = run(grid=grid, faults=[Fault("worker-0", 60, "silent")], failure={"timeout_s": 60.0})
    ((at, stopped),) = host.did(StopWorker)
    assert stopped.worker == "worker-0"
    silent_s = at - (START_S + 60 * 0.05)
    assert LEAST_SILENCE_TIMEOUT_S <= silent_s <= LEAST_SILENCE_TIMEOUT_S + 0.5


def test_a_hanging_workers_batches_are_taken_over_by_an_idle_one() -> None:
    host = run(faults=[Fault("worker-0", 20, "silent")], failure={"timeout_s": 30.0})
    assert {(note["worker"], note["by"]) for note in notes(host, "taken_over")} == {("worker-0", "worker-1")}
    assert_exactly_once(host, 1)
    assert host.did(Commit)[-1][0] < START_S + 10  # the run did not wait for the limit of 30 s


def test_a_worker_given_up_is_not_listened_to_any_more() -> None:
    host = run(faults=[Fault("worker-0", 3, "silent")], failure={"timeout_s": 2.0}, run={"epochs": 3})
    assert host.finish == Finish("finished")
    coordinator, _ = start()
    assert coordinator.handle(WorkerLost("worker-9", "killed"), 1.0) == ()
    assert coordinator.status(1.0).charged_failures == 0


def test_who_waits_for_a_receipt_is_not_silent() -> None:
    slow = {"worker-0": 0.01, "worker-1": 3.0}
    host = run("bsp", grid=EpochGrid((12,), 12), compute_s=lambda w, b: slow[w], failure={"timeout_s": 3.5})
    assert host.finish == Finish("finished")
    assert host.did(StopWorker) == []


def test_nobody_is_given_up_before_the_servers_have_said_who_showed_life() -> None:
    host = run(grid=EpochGrid((400,), 400), timing=Timing(poll_s=8.0), lease_s=50.0, failure={"timeout_s": 5.0})
    assert host.finish == Finish("finished")
    assert host.did(StopWorker) == []


def test_nobody_is_given_up_while_a_server_is_restored() -> None:
    host = run_killing([(2.0, 0)], timing=Timing(restore_s=30.0), failure={"timeout_s": 2.0})
    assert host.finish == Finish("finished")
    assert host.did(StopWorker) == []


def test_a_worker_that_never_starts_is_replaced_after_the_time_limit() -> None:
    starts = {"worker-0": float("inf")}
    limits = {"timeout_s": 2.0, "start_timeout_s": 3.0}
    host = run(start_s=lambda worker: starts.get(worker, START_S), failure=limits, run={"max_time_s": 9.0})
    assert host.finish == Finish("finished")
    assert [(at, stopped.worker) for at, stopped in host.did(StopWorker)] == [(5.0, "worker-0")]


def test_if_nobody_ever_starts_the_run_fails() -> None:
    limits = {"start_timeout_s": 7.0, "timeout_s": 2.0, "max_failures": 3}
    host = run(start_s=lambda worker: float("inf"), failure=limits)
    assert host.finish
    assert host.finish.status == "failed"
    assert "not started after 9.0 s (see failure.start_timeout_s)" in str(host.finish.error)
