"""Whole runs of the coordinator: workers that die, fail or lose their lane, and gradients that are not finite."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psgd.core.driver.events import Finish, StartWorker, StopWorker, WorkerLost
from psgd_workers.errors import WorkerError
from psgd_workers.messages import BatchId, FloatArray
from tests.support.coordinator_runs import FAULTS, GRID, SIZE, assert_exactly_once, notes, run, speeds, validate
from tests.support.in_process import Fault, FaultKind
from tests.support.jobs import START, quadratic


@pytest.mark.parametrize("mode", ["async", "bsp"])
@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("workers", [1, 3])
def test_a_failure_costs_time_and_nothing_else(mode: str, kind: FaultKind, workers: int) -> None:
    host = run(mode, workers, faults=[Fault("worker-0", 7, kind)], failure={"timeout_s": 3.0})
    assert host.finish == Finish("finished")
    assert_exactly_once(host, 1)
    counts = host.status.ledger
    taken_over = kind == "silent" and mode == "async" and workers > 1  # the silence is noticed after the last batch
    charged = 0 if kind == "lane" else 1
    assert (counts.batches, counts.applied, host.status.charged_failures) == (SIZE, SIZE, charged)
    assert (counts.requeued > 0) != taken_over
    hired = [start.worker for _, start in host.did(StartWorker)]
    assert (f"worker-{workers}" in hired) == (kind != "lane" and not taken_over)


@settings(max_examples=60)
@given(
    st.sampled_from(["async", "bsp"]),
    st.integers(1, 4),
    st.integers(0, 2**32),
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 12), st.sampled_from(FAULTS)), max_size=8),
)
def test_nothing_is_lost_or_counted_twice_whatever_dies(
    mode: str, workers: int, seed: int, faults: list[tuple[int, int, FaultKind]]
) -> None:
    scripted = [Fault(f"worker-{number}", pushes, kind) for number, pushes, kind in faults]
    host = run(
        mode,
        workers,
        run={"epochs": 2},
        compute_s=speeds(seed),
        faults=scripted,
        failure={"timeout_s": 2.0, "max_failures": -1, "poison_tries": 100},  # several workers may die at one batch
        evaluate=validate,
        checkpoint={"every_s": None, "every_updates": 10},
    )
    assert host.finish == Finish("finished")
    assert_exactly_once(host, 2)


@settings(max_examples=20)
@given(st.integers(1, 3), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 12)), max_size=5))
def test_a_batch_that_one_partition_lacks_is_pushed_to_both_and_counted_once_in_each(
    workers: int, faults: list[tuple[int, int]]
) -> None:
    torn = [Fault(f"worker-{number}", pushes, "torn") for number, pushes in faults]
    limits = {"max_failures": -1, "poison_tries": 100}
    host = run(workers=workers, scaling={"servers": 2}, faults=torn, failure=limits)
    assert host.finish == Finish("finished")
    assert_exactly_once(host, 1)
    fired = host.status.charged_failures
    first, second = (host.servers[partition].report().pushes["duplicate"] for partition in range(2))
    assert first - second == fired  # a batch taken over from a slow worker is a duplicate in both


@pytest.mark.parametrize(("allowed", "status"), [(1, "failed"), (2, "finished"), (-1, "finished"), (0, "failed")])
def test_more_failures_than_allowed_fail_the_run(allowed: int, status: str) -> None:
    faults = [Fault("worker-0", 2, "before"), Fault("worker-1", 5, "after")]
    host = run(faults=faults, failure={"max_failures": allowed})
    assert host.finish
    assert host.finish.status == status
    if status == "failed":
        assert f"failure.max_failures is {allowed}" in str(host.finish.error)


def test_failures_are_counted_by_kind() -> None:
    faults = [Fault("worker-0", 2, "before"), Fault("worker-1", 4, "silent")]
    preempted = WorkerLost("worker-2", "its node was taken away", preempted=True)
    host = run(faults=faults, events=[(3.0, preempted)], failure={"timeout_s": 2.0}, failing_saves={0},
               checkpoint={"every_s": None, "every_updates": 30})  # fmt: skip
    assert host.status.failures == Counter({"worker_lost": 1, "worker_silent": 1, "preempted": 1, "save_failed": 1})
    assert host.status.charged_failures == 2


def test_a_worker_that_recovers_is_noted_and_goodput_counts_what_was_wasted() -> None:
    host = run(workers=1, faults=[Fault("worker-0", 7, "before")])
    (note,) = notes(host, "worker_recovered")
    assert (note["worker"], note["batches_again"]) == ("worker-0", 9)
    assert host.status.goodput == SIZE / (SIZE + 1)
    assert run().status.goodput == 1


def test_a_preempted_worker_is_replaced_and_not_charged() -> None:
    taken: list[WorkerLost] = [WorkerLost("worker-0", "its node was taken away", preempted=True)]
    host = run(events=[(2.0, taken[0])], failure={"max_failures": 0})
    assert host.finish == Finish("finished")
    assert [start.worker for _, start in host.did(StartWorker)] == ["worker-0", "worker-1", "worker-2"]


@pytest.mark.parametrize(("failing", "replaced"), [((3, 4), False), ((3, 4, 5), True), ((3, 4, 30), False)])
def test_a_worker_that_cannot_reach_its_server_three_times_in_a_row_is_replaced(
    failing: tuple[int, ...], replaced: bool
) -> None:
    host = run(faults=[Fault("worker-0", push, "lane") for push in failing])
    assert_exactly_once(host, 1)
    assert host.status.failures == ({"lane_failed": 1} if replaced else {})
    assert [stopped.worker for _, stopped in host.did(StopWorker)] == ["worker-0"] * replaced


def test_the_models_own_error_fails_the_run_at_once() -> None:
    def raising(batch: BatchId, weights: FloatArray, out: FloatArray) -> float:
        if batch == GRID.batch(0, 5):
            raise WorkerError("the model raised: no such layer")
        return quadratic(batch, weights, out)

    host = run(gradient=raising)
    assert host.finish
    assert host.finish.status == "failed"
    assert "no such layer" in str(host.finish.error)


@pytest.mark.parametrize("mode", ["async", "bsp"])
def test_a_diverged_run_fails_and_names_the_remedy(mode: str) -> None:
    def diverging(batch: BatchId, weights: FloatArray, out: FloatArray) -> float:
        out[:] = np.nan
        return float("nan")

    host = run(mode, gradient=diverging, failure={"max_rejected": 5})
    assert host.finish
    assert host.finish.status == "failed"
    assert "Lower optimizer.lr" in str(host.finish.error)
    np.testing.assert_array_equal(host.weights, START)


@pytest.mark.parametrize("mode", ["async", "bsp"])
def test_a_few_gradients_that_are_not_finite_are_computed_again(mode: str) -> None:
    seen: set[BatchId] = set()

    def hiccup(batch: BatchId, weights: FloatArray, out: FloatArray) -> float:
        loss = quadratic(batch, weights, out)
        if batch.index % 10 == 3 and batch not in seen:
            seen.add(batch)
            out[0] = np.inf
        return loss

    host = run(mode, gradient=hiccup)
    assert host.finish == Finish("finished")
    assert_exactly_once(host, 1)
    assert host.servers[0].report().pushes["rejected"] == len(seen) == 8
