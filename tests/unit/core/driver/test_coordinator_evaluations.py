"""Whole runs of the coordinator: which weights are validated, and by which worker."""

from __future__ import annotations

import numpy as np

from psgd.core.driver.events import Evaluate, Finish, WorkerLost
from tests.support.coordinator_runs import GRID, SIZE, run, run_killing, validate, validations
from tests.support.in_process import EVALUATE_S
from tests.support.jobs import START, quadratic


def test_every_epoch_is_evaluated_once_on_the_weights_it_ended_with() -> None:
    host = run(workers=1, run={"epochs": 3}, evaluate=validate)
    serial = START.copy()
    expected = {}
    for epoch in range(3):
        for position in range(SIZE):
            gradient = np.empty_like(serial)
            quadratic(GRID.batch(epoch, position), serial, gradient)
            serial -= np.float32(0.1) * gradient
        expected[epoch + 1] = validate(serial)
    assert validations(host) == expected
    assert len(host.did(Evaluate)) == 3


def test_a_run_that_ends_inside_an_epoch_evaluates_the_weights_it_ends_with() -> None:
    host = run(run={"max_updates": SIZE + 5}, evaluate=validate)
    assert list(validations(host)) == [1]
    assert host.status.validation_epoch == 1 + 5 / SIZE
    assert host.status.validation == validate(host.weights)


def test_what_a_dead_worker_was_evaluating_goes_to_another() -> None:
    lost = WorkerLost("worker-0", "killed")
    ends = run(workers=1, evaluate=validate).did(Evaluate)[0][0]
    host = run(workers=1, evaluate=validate, events=[(ends + EVALUATE_S / 2, lost)])
    assert host.finish == Finish("finished")
    assert [evaluate.worker for _, evaluate in host.did(Evaluate)] == ["worker-0", "worker-1"]
    assert validations(host) == {1: validate(host.weights)}


def test_an_evaluation_whose_weights_are_lost_is_not_waited_for() -> None:
    host = run_killing([(4.70, 0)], run={"epochs": 3}, evaluate=validate, checkpoint={"every_s": 0.3})
    assert host.finish == Finish("finished")
    assert validations(host)[3] == validate(host.weights)


def test_without_validation_data_nothing_is_evaluated() -> None:
    assert run().did(Evaluate) == []
