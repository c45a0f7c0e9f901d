from __future__ import annotations

from psgd.core.driver.events import Skip
from psgd.core.driver.ledger import Ledger
from psgd.core.driver.poison import PoisonTracker
from psgd_workers.messages import BatchId
from tests.support.jobs import GRID

ONE = BatchId(0, 0, 1)
OTHER = BatchId(0, 0, 2)


def test_a_batch_that_workers_die_at_is_poison_after_so_many() -> None:
    tracker = PoisonTracker(GRID, 3)
    assert [tracker.died(ONE) for _ in range(4)] == [False, False, True, False]
    assert not tracker.died(OTHER)
    assert tracker.poison == {ONE}


def test_rejections_are_counted_by_the_servers_whose_counts_may_start_again() -> None:
    tracker = PoisonTracker(GRID, 3)
    assert tracker.rejected([(ONE, 2)]) == []
    assert tracker.rejected([(ONE, 2), (OTHER, 1)]) == []  # another partition counts the same pushes
    assert tracker.rejected([(ONE, 1)]) == []  # a restored server started to count again
    assert tracker.rejected([(ONE, 3)]) == [ONE]
    assert tracker.rejected([(ONE, 4)]) == []


def test_deaths_and_rejections_add_up() -> None:
    tracker = PoisonTracker(GRID, 3)
    tracker.rejected([(ONE, 2)])
    assert tracker.died(ONE)
    assert tracker.tries(ONE) == 3


def test_poison_is_withheld_in_its_own_epoch_whenever_that_is_turned_to() -> None:
    tracker = PoisonTracker(GRID, 1)
    ledger = Ledger(GRID)
    tracker.died(OTHER)
    tracker.died(ONE)
    assert tracker.skips(ledger) == [Skip(ONE), Skip(OTHER)]
    assert ledger.pending == GRID.num_batches - 2
    ledger.start_epoch(1)
    assert tracker.skips(ledger) == []
    ledger.start_epoch(0)
    assert tracker.skips(ledger) == [Skip(ONE), Skip(OTHER)]
