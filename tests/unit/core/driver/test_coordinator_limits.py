"""Whole runs of the coordinator: the limits of `run` that end a run."""

from __future__ import annotations

from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psgd.core.driver.events import Finish
from psgd_workers.messages import BatchId, Evaluation, FloatArray
from tests.support.coordinator_runs import FAULTS, run, speeds
from tests.support.in_process import Fault, FaultKind
from tests.support.jobs import quadratic


@settings(max_examples=40)
@given(st.sampled_from(["async", "bsp"]), st.integers(1, 4), st.integers(1, 150), st.integers(0, 2**32))
def test_max_updates_is_met_exactly(mode: str, workers: int, updates: int, seed: int) -> None:
    host = run(mode, workers, run={"max_updates": updates}, compute_s=speeds(seed))
    assert host.finish == Finish("finished")
    assert host.servers[0].version.updates == updates == host.checkpoints[-1].updates


@settings(max_examples=20)
@given(st.sampled_from([kind for kind in FAULTS if kind != "late"]), st.integers(0, 5), st.integers(1, 60))
def test_max_updates_of_async_is_met_exactly_whatever_dies(kind: FaultKind, pushes: int, updates: int) -> None:
    host = run(run={"max_updates": updates}, faults=[Fault("worker-0", pushes, kind)], failure={"timeout_s": 2.0})
    assert host.finish == Finish("finished")
    assert host.servers[0].version.updates == updates


@settings(max_examples=20)
@given(st.integers(0, 5), st.integers(1, 60), st.integers(2, 4))
def test_a_dead_workers_late_push_may_be_one_update_too_many(pushes: int, updates: int, workers: int) -> None:
    faults = [Fault("worker-0", pushes, "late")]
    host = run(workers=workers, run={"max_updates": updates}, faults=faults)
    assert host.servers[0].version.updates in (updates, updates + 1)


@pytest.mark.parametrize("mode", ["async", "bsp"])
def test_max_time_ends_a_run_in_good_order(mode: str) -> None:
    host = run(mode, run={"max_time_s": 3.0})
    assert host.finish == Finish("finished")
    assert host.status.began is not None
    assert host.status.began + 3 <= host.now <= host.status.began + 3.2
    assert host.checkpoints[-1].updates == host.servers[0].version.updates
    assert host.status.open_leases == 0


def test_a_validation_target_ends_the_run_after_the_epoch_that_reached_it() -> None:
    accuracies = (0.1 * epoch for epoch in count(1))
    target = {"metric": "val/accuracy", "value": 0.35}
    host = run(run={"epochs": 100, "target": target}, evaluate=lambda w: Evaluation(1.0, next(accuracies), 1))
    assert host.finish == Finish("finished")
    assert 4 <= host.status.epochs <= 5  # the next epoch trains while the last one is evaluated


def test_a_training_loss_target_needs_no_validation() -> None:
    losses: dict[int, float] = {}

    def falling(batch: BatchId, weights: FloatArray, out: FloatArray) -> float:
        quadratic(batch, weights, out)
        return losses.setdefault(batch.epoch, 1 / (1 + batch.epoch))

    host = run(run={"epochs": 100, "target": {"metric": "train/loss", "value": 0.3}}, gradient=falling)
    assert host.finish == Finish("finished")
    assert 4 <= host.status.epochs <= 5
    assert len(losses) <= 5
