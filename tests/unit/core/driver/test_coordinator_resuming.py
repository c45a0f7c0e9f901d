"""Whole runs of the coordinator: a run that is resumed from a checkpoint."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from psgd.core.driver.events import Finish
from psgd_workers.messages import BatchId, FloatArray
from tests.support.coordinator_runs import FAULTS, GRID, SIZE, run, speeds, validate
from tests.support.in_process import Fault, FaultKind, InProcess
from tests.support.jobs import quadratic


def three_runs(mode: str, workers: int, at: int, **options: Any) -> tuple[InProcess, InProcess, InProcess]:
    """Return three runs: undisturbed, with a checkpoint every `at` updates, and resumed from the first checkpoint."""
    spec: dict[str, Any] = {"run": {"epochs": 2}, "optimizer": {"lr": 0.1, "momentum": 0.9}} | options
    whole = run(mode, workers, **spec)
    first = run(mode, workers, checkpoint={"every_s": None, "every_updates": at}, **spec)
    return whole, first, run(mode, workers, resume=first.checkpoints[0], **spec)


@settings(max_examples=20)
@given(st.integers(1, SIZE), st.integers(0, 2**32))
def test_one_worker_resumed_ends_bit_for_bit_as_undisturbed(at: int, seed: int) -> None:
    whole, first, second = three_runs("async", 1, at, compute_s=speeds(seed))
    assert first.checkpoints[0].updates < 2 * SIZE  # the second epoch is still under way
    assert second.applied[0].read.updates == first.checkpoints[0].updates
    np.testing.assert_array_equal(second.weights, whole.weights)
    np.testing.assert_array_equal(first.weights, whole.weights)


@settings(max_examples=20)
@given(st.integers(2, 4), st.integers(1, 30), st.integers(0, 2**32))
def test_bsp_of_constant_size_resumed_ends_bit_for_bit_as_undisturbed(workers: int, at: int, seed: int) -> None:
    whole, first, second = three_runs("bsp", workers, at, compute_s=speeds(seed))
    assert first.checkpoints[0].updates < whole.servers[0].version.updates
    np.testing.assert_array_equal(second.weights, whole.weights)


@settings(max_examples=20)
@given(st.sampled_from(["async", "bsp"]), st.integers(1, 100), st.integers(1, 4), st.sampled_from(FAULTS))
def test_a_resumed_run_applies_what_was_missing(mode: str, at: int, workers: int, kind: FaultKind) -> None:
    spec: dict[str, Any] = {"run": {"epochs": 2}, "compute_s": speeds(at), "failure": {"timeout_s": 2.0}}
    first = run(mode, 3, checkpoint={"every_s": None, "every_updates": at}, **spec)
    second = run(mode, workers, resume=first.checkpoints[0], faults=[Fault("worker-0", 3, kind)], **spec)
    assert second.finish == Finish("finished")
    state = first.checkpoints[0].states[0]
    saved = [applied.batch for applied in first.applied if applied.after.updates <= first.checkpoints[0].updates]
    everything = {GRID.batch(epoch, position) for epoch in range(2) for position in range(SIZE)}
    assert Counter(saved + [applied.batch for applied in second.applied]) == Counter(everything)
    assert state.metadata["samples"] == len(saved)
    counts = second.status.ledger
    assert counts.batches == counts.applied == 2 * SIZE


def test_resuming_a_finished_run_finishes_at_once() -> None:
    first = run(evaluate=validate)
    again = run(resume=first.checkpoints[-1], evaluate=validate)
    assert again.finish == Finish("finished")
    assert (again.applied, again.checkpoints) == ([], [])
    assert (again.status.validation_epoch, again.status.validation) == (1, validate(first.weights))


def test_rejections_before_a_resumption_are_past() -> None:
    seen: set[BatchId] = set()

    def hiccup(batch: BatchId, weights: FloatArray, out: FloatArray) -> float:
        loss = quadratic(batch, weights, out)
        if batch.index < 4 and batch not in seen:
            seen.add(batch)
            return float("nan")
        return loss

    first = run(run={"max_updates": 60}, gradient=hiccup, failure={"max_rejected": 20})
    assert first.servers[0].report().pushes["rejected"] > 2
    second = run(resume=first.checkpoints[-1], gradient=hiccup, failure={"max_rejected": 0})
    assert second.finish == Finish("finished")
