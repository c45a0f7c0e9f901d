"""Whole runs of the coordinator: batches that kill their workers, or whose gradient is never finite."""

from __future__ import annotations

from typing import Any

import pytest

from psgd.core.driver.events import Finish, Grant, Skip, WorkerLost
from psgd_workers.messages import BatchId, FloatArray
from tests.support.coordinator_runs import GRID, SIZE, leased, notes, run
from tests.support.in_process import InProcess
from tests.support.jobs import START, job, quadratic

POISON = GRID.batch(0, 9)


class Poisoned(InProcess):
    """A run in which every worker that computes the batch POISON dies."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, compute_s=self._dies_of_it, **options)

    def _dies_of_it(self, worker: str, batch: BatchId) -> float:
        if batch == POISON:
            self.kill(worker)
            self.tell_soon(WorkerLost(worker, "killed by the kernel"), 0.05)
        return 0.05


def poisoned(failure: dict[str, Any], **scaling: int) -> Poisoned:
    return Poisoned(job("async", 2, failure=failure, scaling=scaling), GRID, START, quadratic)


def test_a_batch_that_kills_its_workers_fails_the_run_and_is_named() -> None:
    host = poisoned({"poison_tries": 3}).run()
    assert host.finish
    assert host.finish.status == "failed"
    assert f"{POISON.text} was tried 3 times" in str(host.finish.error)
    assert "set failure.poison to skip" in str(host.finish.error)
    assert host.status.charged_failures == 3  # the poison itself is not charged


@pytest.mark.parametrize("tries", [1, 3])
def test_or_it_is_done_without(tries: int) -> None:
    host = poisoned({"poison": "skip", "poison_tries": tries}).run()
    assert host.finish == Finish("finished")
    assert host.status.charged_failures == tries
    assert [note["batch"] for note in notes(host, "poison_skipped")] == [POISON]
    assert [skip.batch for _, skip in host.did(Skip)] == [POISON]
    assert host.servers[0].report().pushes["applied"] == SIZE - 1
    assert host.status.ledger.batches == SIZE


def test_a_suspect_is_leased_by_itself() -> None:
    host = poisoned({"poison": "skip", "poison_tries": 3}).run()
    with_it = [lease for lease in leased(host.did(Grant)) if (0, 9) in lease.positions()]
    assert [len(lease) == 1 for lease in with_it] == [False, True, True]


def test_a_gradient_that_is_never_finite_is_poison_too() -> None:
    def never_finite(batch: BatchId, weights: FloatArray, out: FloatArray) -> float:
        loss = quadratic(batch, weights, out)
        return float("nan") if batch == POISON else loss

    host = run(gradient=never_finite, failure={"poison": "skip"})
    assert host.finish == Finish("finished")
    assert host.servers[0].report().pushes["rejected"] == 3
    assert host.servers[0].report().pushes["applied"] == SIZE - 1


def test_a_restored_server_is_told_again_what_to_do_without() -> None:
    host = poisoned({"poison": "skip", "poison_tries": 1}, servers=2)
    host.after(3.0, host.kill_server, 1)
    host.run()
    assert host.finish == Finish("finished")
    assert {server.report().pushes["applied"] for server in host.servers.values()} == {SIZE - 1}
    assert len(host.did(Skip)) >= 2
