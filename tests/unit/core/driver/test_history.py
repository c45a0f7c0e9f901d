from __future__ import annotations

from typing import Any, cast

from psgd.core.driver.history import RECENT, History
from psgd.core.server.report import EpochLoss, Report


class Losses:
    """A stand-in for a report that holds losses only."""

    def __init__(self, losses: dict[int, float]) -> None:
        self.losses = {epoch: EpochLoss(10 * loss, 10) for epoch, loss in losses.items()}


def advance(history: History, epochs: int, **losses: float) -> None:
    reported = Losses({int(name[1:]): loss for name, loss in losses.items()})
    history.advance(epochs, [cast(Report, cast(Any, reported))])


def test_epochs_are_kept_with_their_losses() -> None:
    history = History()
    advance(history, 1, e0=0.5, e1=0.4)
    advance(history, 1, e0=0.5, e1=0.3)
    advance(history, 2, e1=0.25, e2=0.2)
    assert list(history) == [(1, 0.5), (2, 0.25)]


def test_an_epoch_whose_loss_nobody_reported_has_none() -> None:
    history = History()
    advance(history, 2, e1=0.25)
    assert list(history) == [(1, None), (2, 0.25)]


def test_the_epochs_of_an_earlier_process_are_not_of_this_one() -> None:
    history = History()
    history.begin(5)
    advance(history, 5, e4=0.5)
    assert list(history) == []
    advance(history, 6, e5=0.4)
    assert list(history) == [(6, 0.4)]


def test_epochs_that_a_restored_server_does_not_contain_are_forgotten_until_they_are_done_again() -> None:
    history = History()
    advance(history, 1, e0=0.5)
    advance(history, 2, e1=0.4)
    advance(history, 1)
    assert list(history) == [(1, 0.5)]
    advance(history, 2, e1=0.3)
    assert list(history) == [(1, 0.5), (2, 0.3)]


def test_a_long_run_keeps_its_newest_epochs() -> None:
    history = History()
    for epoch in range(3 * RECENT):
        advance(history, epoch + 1, **{f"e{epoch}": 0.5})
    assert [epoch for epoch, _ in history] == list(range(2 * RECENT + 1, 3 * RECENT + 1))
