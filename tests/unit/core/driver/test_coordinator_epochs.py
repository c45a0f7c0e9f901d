"""Whole runs of the coordinator: every batch of every epoch is applied exactly once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psgd.core.driver.events import Finish
from psgd.result import LedgerCounts
from psgd_workers.messages import EpochGrid
from tests.support.coordinator_runs import (
    GRID,
    SIZE,
    assert_exactly_once,
    notes,
    run,
    run_killing,
    speeds,
    validate,
    validations,
)


@settings(max_examples=25)
@given(st.sampled_from(["async", "bsp"]), st.integers(1, 4), st.integers(0, 2**32))
def test_every_batch_of_every_epoch_is_applied_exactly_once(mode: str, workers: int, seed: int) -> None:
    host = run(mode, workers, run={"epochs": 2}, compute_s=speeds(seed), evaluate=validate)
    assert host.finish == Finish("finished")
    assert_exactly_once(host, 2)
    twice = host.status.ledger.duplicates  # batches that an idle worker took over from a slow one
    assert host.status.ledger == LedgerCounts(2 * SIZE, 2 * SIZE, twice, 0, 0)
    assert not twice or mode == "async"
    assert (host.status.epochs, host.status.updates) == (2, host.servers[0].version.updates)


@pytest.mark.parametrize("mode", ["async", "bsp"])
def test_an_epoch_of_one_batch_trains(mode: str) -> None:
    one = EpochGrid((1,), 1)
    host = run(mode, 3, one, run={"epochs": 4})
    assert host.finish == Finish("finished")
    assert_exactly_once(host, 4, one)


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_round_r_of_bsp_consists_of_the_epochs_positions_from_r_times_n_on(workers: int) -> None:
    host = run("bsp", workers, run={"epochs": 2}, compute_s=speeds(7))
    rounds_per_epoch = -(-SIZE // workers)
    for applied in host.applied:
        epoch, in_epoch = divmod(applied.after.updates - 1, rounds_per_epoch)
        assert applied.batch.epoch == epoch
        assert GRID.position(applied.batch) // workers == in_epoch
        assert applied.read == applied.after._replace(updates=applied.after.updates - 1)


def test_every_worker_joins_before_the_first_of_a_round_can_push() -> None:
    host = run("bsp", 3)
    kinds = [type(action).__name__ for _, action in host.actions]
    first_grant = kinds.index("Grant")
    assert kinds[:first_grant].count("Join") == 3


def test_an_earlier_epoch_is_reopened_for_a_partition_that_does_not_contain_it() -> None:
    host = run_killing([(4.0, 1)], run={"epochs": 3}, scaling={"servers": 2}, evaluate=validate)
    assert host.finish == Finish("finished")
    assert notes(host, "epoch_reopened") == [{"epoch": 0}]
    for server in host.servers.values():
        assert server.report().pushes["applied"] == 3 * SIZE
    assert validations(host)[3] == validate(host.weights)
