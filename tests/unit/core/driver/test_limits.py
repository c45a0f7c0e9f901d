from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from psgd.core.driver.limits import Limits
from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.partitions import Partition
from psgd.core.server.report import EpochLoss, Report
from psgd.spec import RunConfig
from psgd_workers.messages import Evaluation, Version
from tests.support.jobs import GRID, START, job


def limits(**run: Any) -> Limits:
    return Limits(RunConfig.model_validate({"epochs": 10} | run))


def report(**losses: float) -> Report:
    empty = ParameterServer(job(), Partition(0, 0, 6, 6), START, GRID, Version(1, 0)).report()
    return replace(empty, losses={int(epoch[1:]): EpochLoss(loss * 8, 8) for epoch, loss in losses.items()})


@pytest.mark.parametrize(("epochs", "updates", "reached"), [(9, 99, False), (10, 0, True), (0, 100, True)])
def test_whichever_limit_comes_first_is_reached(epochs: int, updates: int, reached: bool) -> None:
    assert limits(max_updates=100).reached(epochs, updates) is reached


def test_a_limit_not_given_is_never_reached() -> None:
    only_time = limits(epochs=None, max_time_s=5)
    assert not only_time.reached(10**9, 10**9)
    assert only_time.updates_left(10**9) is None
    assert limits().deadline(began=3.0) == float("inf")


@pytest.mark.parametrize(("updates", "left"), [(0, 100), (99, 1), (100, 0), (103, 0)])
def test_updates_left_are_never_negative(updates: int, left: int) -> None:
    assert limits(max_updates=100).updates_left(updates) == left


def test_time_counts_from_the_beginning_of_training() -> None:
    assert limits(max_time_s=5).deadline(began=3.0) == 8
    assert limits(max_time_s=5).deadline(began=None) == float("inf")


def test_without_a_target_nothing_is_good_enough() -> None:
    assert not limits().target_reached(1, [report(e0=0.0)], [Evaluation(0.0, 1.0, 8)])


@pytest.mark.parametrize(
    ("metric", "value", "reached"),
    [("val/accuracy", 0.9, True), ("val/accuracy", 0.91, False), ("val/loss", 0.3, True), ("val/loss", 0.29, False)],
)
def test_any_evaluation_can_reach_the_target(metric: str, value: float, reached: bool) -> None:
    evaluations = [Evaluation(0.5, 0.8, 8), Evaluation(0.3, 0.9, 8), Evaluation(0.4, 0.85, 8)]
    target = limits(target={"metric": metric, "value": value})
    assert target.target_reached(3, [report(e2=9.0)], evaluations) is reached


def test_a_regression_reaches_no_accuracy() -> None:
    assert not limits(target={"metric": "val/accuracy", "value": 0}).target_reached(1, [], [Evaluation(1.0, None, 8)])


def test_the_training_loss_of_a_complete_epoch_counts() -> None:
    target = limits(target={"metric": "train/loss", "value": 0.5})
    assert target.target_reached(2, [report(e1=0.5, e2=9.0)], [])
    assert not target.target_reached(2, [report(e1=0.6, e2=0.1)], [])  # epoch 2 is open
    assert not target.target_reached(0, [report(e0=0.1)], [])


@pytest.mark.parametrize(("every", "validated"), [(1, [1, 2, 3, 4]), (2, [2, 4]), (3, [3]), (0, [])])
def test_every_nth_epoch_is_validated(every: int, validated: list[int]) -> None:
    limits = Limits(RunConfig(epochs=4, validate_every=every))
    assert [epochs for epochs in range(1, 5) if limits.validates(epochs)] == validated
