"""The status of whole runs on a virtual clock."""

from __future__ import annotations

from typing import Any

import pytest

from psgd.core.driver.events import Action, Scale, ServerLost, Stop
from psgd.core.driver.status import RunStatus
from psgd.simulation.problem import Timing
from psgd_workers.messages import EpochGrid, Evaluation, FloatArray
from tests.support.in_process import START_S, Fault, InProcess
from tests.support.jobs import START, job, quadratic

GRID = EpochGrid((20, 20), 40)
SIZE = GRID.num_batches


def validate(weights: FloatArray) -> Evaluation:
    return Evaluation(float(weights.sum()), None, 1)


class Watched(InProcess):
    """A run whose status is recorded after every action of the coordinator."""

    def __init__(self, spec: Any, **options: Any) -> None:
        self.statuses: list[RunStatus] = []
        super().__init__(spec, GRID, START, quadratic, **options)

    def act(self, action: Action) -> None:
        super().act(action)
        self.statuses.append(self.status)


def watch(mode: str = "async", workers: int = 2, sections: dict[str, Any] | None = None, **options: Any) -> Watched:
    return Watched(job(mode, workers, **(sections or {})), **options).run()


def waits(run: Watched, phase: str) -> set[tuple[str, ...]]:
    return {status.waiting_for for status in run.statuses if status.phase == phase}


def test_a_run_goes_through_its_phases_and_never_back_in_time() -> None:
    run = watch(sections={"run": {"epochs": 2}})
    phases = [status.phase for status in run.statuses]
    assert [phase for at, phase in enumerate(phases) if phases[:at][-1:] != [phase]] == [
        *("starting", "training", "ending", "ended")
    ]
    done = [status.epochs * SIZE + status.batches for status in run.statuses]
    assert done == sorted(done)
    assert (run.status.epochs, run.status.updates, run.status.examples) == (2, 2 * SIZE, 2 * SIZE)
    assert run.status.elapsed_s == run.now - START_S


def test_it_is_of_one_instant_and_does_not_change_afterwards() -> None:
    run = watch()
    first = next(status for status in run.statuses if status.phase == "training")
    assert (first.updates, first.epochs, first.ledger.applied) == (0, 0, 0)
    with pytest.raises(AttributeError):
        first.updates = 1  # type: ignore[misc]


def test_asking_for_it_changes_nothing() -> None:
    watched = watch(evaluate=validate)
    alone = InProcess(job("async", 2), GRID, START, quadratic, evaluate=validate)
    alone.run()
    assert watched.actions == alone.actions


def test_losses_and_validations_are_those_of_their_own_epochs() -> None:
    run = watch(sections={"run": {"epochs": 4}}, compute_s=lambda worker, batch: 0.001, evaluate=validate)
    behind = [s for s in run.statuses if s.validation_epoch is not None and s.validation_epoch < s.epochs]
    assert behind  # an epoch ended before the one before it was validated
    ended = {one.epoch: one for one in run.status.recent_epochs}
    assert list(ended) == [1, 2, 3, 4]
    for status in run.statuses:
        if status.validation_epoch is not None:
            assert status.validation == ended[int(status.validation_epoch)].validation
        for one in status.recent_epochs:
            assert one.loss == ended[one.epoch].loss
            assert one.validating == (one.validation is None)


def test_an_epoch_that_is_not_to_be_validated_is_not_waited_for() -> None:
    run = watch(sections={"run": {"epochs": 2}})
    assert not any(one.validating for status in run.statuses for one in status.recent_epochs)
    (interrupted,) = {
        one.validating
        for one in watch(
            sections={"run": {"epochs": 9}}, events=[(START_S + 3.0, Stop("interrupted"))], evaluate=validate
        ).status.recent_epochs
    }
    assert interrupted is False


def test_the_training_loss_names_the_epoch_that_it_is_of() -> None:
    run = watch(sections={"run": {"epochs": 3}})
    named = [status.loss_epoch for status in run.statuses if status.loss_epoch is not None]
    assert named == sorted(named)
    assert set(named) == {1, 2, 3}
    assert run.status.loss == run.status.recent_epochs[-1].loss


def test_before_training_it_names_what_is_not_there_yet() -> None:
    assert ("server 0", "worker-0", "worker-1") in waits(watch(), "starting")
    assert waits(watch(), "training") == {()}


def test_while_a_server_is_restored_it_is_waited_for() -> None:
    run = watch(sections={"scaling": {"servers": 2}}, timing=Timing(restore_s=3.0), events=[(START_S + 0.5, _lose(1))])
    assert ("server 1",) in waits(run, "training")
    assert any(status.servers[1].phase == "restoring" for status in run.statuses)
    assert [(server.phase, server.incarnation) for server in run.status.servers] == [("up", 1), ("up", 2)]


def _lose(partition: int) -> ServerLost:
    return ServerLost(partition, "killed")


def test_in_lockstep_the_slowest_workers_are_waited_for() -> None:
    run = watch("bsp", compute_s=lambda worker, batch: 1.0 if worker == "worker-1" else 0.1)
    assert ("worker-1",) in waits(run, "training")
    assert any(status.workers[0].phase == "waiting" for status in run.statuses if status.workers)


def test_the_end_waits_for_batches_then_the_checkpoint_then_the_validation() -> None:
    run = watch(events=[(START_S + 0.5, Stop("stopped"))], evaluate=validate, sections={"run": {"epochs": 9}})
    order = [status.waiting_for for status in run.statuses if status.phase == "ending" and status.waiting_for]
    firsts = list(dict.fromkeys(names[0] for names in order))
    assert set(firsts[:-2]) <= {"worker-0", "worker-1"}
    assert firsts[-2:] == ["checkpoint", "validation of the final weights"]


def test_a_failed_last_checkpoint_waits_for_the_storage() -> None:
    run = watch(failing_saves=[0], sections={"checkpoint": {"every_s": None}})
    assert ("storage",) in waits(run, "ending")
    failed = next(status for status in run.statuses if status.waiting_for == ("storage",))
    assert (failed.checkpoint.retries, failed.checkpoint.fault) == (True, "the disk is full")
    assert failed.checkpoint.text == "nothing is saved"
    assert run.status.checkpoint.text == f"the newest checkpoint contains {SIZE} updates and 1 complete epoch"


def test_workers_are_described_by_what_they_are_at() -> None:
    run = watch(
        workers=3, faults=[Fault("worker-2", 2, "before")], events=[(START_S + 0.6, Scale(1))], evaluate=validate
    )
    seen = {worker.phase for status in run.statuses for worker in status.workers}
    assert seen >= {"starting", "working", "leaving", "evaluating", "idle"}
    assert all(worker.leases <= 2 for status in run.statuses for worker in status.workers)
    assert {status.target_workers for status in run.statuses} == {3, 1}
    assert run.status.failures == {"worker_lost": 1}
    assert run.status.charged_failures == 1


def test_counts_are_those_of_the_servers() -> None:
    run = watch(faults=[Fault("worker-0", 2, "after")])
    report = run.servers[0].report()
    ledger = run.status.ledger
    assert (ledger.batches, ledger.applied, ledger.duplicates) == (SIZE, SIZE, report.pushes["duplicate"])
    assert run.status.staleness == report.staleness
    assert run.status.compiled is None  # simulated
    assert run.status.bytes_per_push == report.bytes_pushed / sum(report.pushes.values())
