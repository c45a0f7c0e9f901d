from __future__ import annotations

import pytest

from psgd.core.driver.evaluations import Evaluations
from psgd.core.driver.events import Evaluate
from psgd.core.driver.workers import WorkerTable
from psgd_workers.messages import Evaluation

GOOD = Evaluation(0.1, 0.9, 8)
BAD = Evaluation(2.0, 0.1, 8)


@pytest.fixture
def worker_table() -> WorkerTable:
    worker_table = WorkerTable(2)
    for worker in worker_table.hire(2, now=0.0):
        worker_table.mark_up(worker.name, now=0.0)
    return worker_table


@pytest.fixture
def evaluations(worker_table: WorkerTable) -> Evaluations:
    return Evaluations(worker_table, enabled=True)


def test_nothing_is_evaluated_without_a_validation_part(worker_table: WorkerTable) -> None:
    disabled = Evaluations(worker_table, enabled=False)
    disabled.want(1)
    assert (disabled.waiting, disabled.open, disabled.assign(now=1.0)) == (False, 0, [])


def test_the_worker_with_the_least_to_do_evaluates(evaluations: Evaluations, worker_table: WorkerTable) -> None:
    worker_table.granted(worker_table["worker-0"], 0, 5, now=1.0)
    evaluations.want(1)
    evaluations.want(2)
    assert evaluations.assign(now=2.0) == [Evaluate("worker-1", 1), Evaluate("worker-0", 2)]
    assert worker_table["worker-1"].alive_at == 2  # it was idle: its time limit starts now
    assert worker_table["worker-0"].alive_at == 1


def test_each_weights_are_evaluated_once(evaluations: Evaluations, worker_table: WorkerTable) -> None:
    for _ in range(2):
        evaluations.want(1)
    assert evaluations.assign(now=1.0) == [Evaluate("worker-0", 1)]
    evaluations.want(1)
    assert evaluations.open == 1
    evaluations.done(worker_table["worker-0"], 1, GOOD, now=2.0)
    evaluations.want(1)
    assert (evaluations.open, evaluations.results) == (0, {1: GOOD})


def test_the_final_weights_have_no_number(evaluations: Evaluations, worker_table: WorkerTable) -> None:
    evaluations.want(None)
    evaluations.want(None)
    assert evaluations.assign(now=1.0) == [Evaluate("worker-0", None)]
    evaluations.done(worker_table["worker-0"], None, GOOD, now=2.0)
    assert evaluations.results == {None: GOOD}


def test_they_wait_for_a_worker() -> None:
    worker_table = WorkerTable(2)
    worker_table.hire(2, now=0.0)  # none is up yet
    evaluations = Evaluations(worker_table, enabled=True)
    evaluations.want(1)
    assert evaluations.assign(now=1.0) == []
    assert (evaluations.waiting, evaluations.open) == (True, 1)


def test_what_a_lost_worker_was_at_goes_first_to_another(evaluations: Evaluations, worker_table: WorkerTable) -> None:
    worker_table.granted(worker_table["worker-1"], 0, 5, now=0.0)
    worker_table.granted(worker_table["worker-1"], 1, 5, now=0.0)
    for epochs in (1, 2):
        evaluations.want(epochs)
    evaluations.assign(now=1.0)
    evaluations.want(3)
    evaluations.worker_lost(worker_table.remove("worker-0"))
    assert [action.epochs for action in evaluations.assign(now=2.0)] == [1, 2, 3]


def test_what_was_found_of_weights_that_are_no_longer_is_forgotten(
    evaluations: Evaluations, worker_table: WorkerTable
) -> None:
    for epochs in (1, 2, 3):
        evaluations.want(epochs)
    evaluations.assign(now=1.0)
    one, two, three = (next(w for w in worker_table if epochs in w.evaluations) for epochs in (1, 2, 3))
    evaluations.done(one, 1, GOOD, now=2.0)
    evaluations.done(two, 2, GOOD, now=2.0)
    evaluations.forget(1)  # a partition is back in the second epoch
    assert evaluations.results == {1: GOOD}
    evaluations.want(3)  # the epoch is complete again before the old evaluation returned
    (again,) = evaluations.assign(now=3.0)
    evaluations.done(three, 3, GOOD, now=4.0)
    assert 3 not in evaluations.results
    evaluations.done(worker_table[again.worker], 3, GOOD, now=5.0)
    assert evaluations.results == {1: GOOD, 3: GOOD}
    assert evaluations.open == 0


def test_what_a_dead_worker_did_in_vain_goes_to_nobody(evaluations: Evaluations, worker_table: WorkerTable) -> None:
    evaluations.want(3)
    (given,) = evaluations.assign(now=1.0)
    evaluations.forget(1)
    evaluations.worker_lost(worker_table.remove(given.worker))
    assert (evaluations.open, evaluations.waiting) == (0, False)


def test_one_that_did_not_begin_may_be_wanted_again(evaluations: Evaluations, worker_table: WorkerTable) -> None:
    evaluations.want(1)
    (given,) = evaluations.assign(now=1.0)
    evaluations.evaluation_lost(worker_table[given.worker], 1, now=2.0)
    assert evaluations.open == 0
    evaluations.want(1)
    assert evaluations.waiting


def test_weights_that_are_evaluated_again_are_awaited_once(worker_table: WorkerTable) -> None:
    """The evaluation of the rolled back weights is still in progress, on the same worker and under the same name."""
    for other in list(worker_table)[1:]:
        worker_table.remove(other.name)
    evaluations = Evaluations(worker_table, enabled=True)
    (worker,) = worker_table
    evaluations.want(5)
    evaluations.assign(now=1.0)
    evaluations.forget(4)
    for _ in range(3):
        evaluations.want(5)
        evaluations.assign(now=2.0)
    assert worker.evaluations == [5, 5]
    assert evaluations.awaited == [5]
    evaluations.done(worker, 5, BAD, now=3.0)  # of the rolled back weights
    assert (evaluations.awaited, evaluations.results) == ([5], {})
    evaluations.done(worker, 5, GOOD, now=4.0)
    assert (evaluations.awaited, evaluations.results) == ([], {5: GOOD})
