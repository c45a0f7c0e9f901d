from __future__ import annotations

from psgd.core.driver.events import Skip
from psgd.core.driver.ledger import Ledger
from psgd.core.driver.poison import Suspects
from psgd_workers.messages import BatchId
from tests.support.jobs import GRID

ONE, OTHER = BatchId(0, 0, 1), BatchId(0, 0, 2)


def test_a_batch_that_workers_die_at_is_poison_after_so_many() -> None:
    suspects = Suspects(GRID, 3)
    assert [suspects.died(ONE) for _ in range(4)] == [False, False, True, False]
    assert not suspects.died(OTHER)
    assert suspects.poison == {ONE}


def test_rejections_are_counted_by_the_servers_whose_counts_may_start_again() -> None:
    suspects = Suspects(GRID, 3)
    assert suspects.rejected([(ONE, 2)]) == []
    assert suspects.rejected([(ONE, 2), (OTHER, 1)]) == []  # another partition counts the same pushes
    assert suspects.rejected([(ONE, 1)]) == []  # a restored one began anew
    assert suspects.rejected([(ONE, 3)]) == [ONE]
    assert suspects.rejected([(ONE, 4)]) == []


def test_deaths_and_rejections_add_up() -> None:
    suspects = Suspects(GRID, 3)
    suspects.rejected([(ONE, 2)])
    assert suspects.died(ONE)
    assert suspects.tries(ONE) == 3


def test_poison_is_withheld_in_its_own_epoch_whenever_that_is_turned_to() -> None:
    suspects, ledger = Suspects(GRID, 1), Ledger(GRID)
    suspects.died(OTHER)
    suspects.died(ONE)
    assert suspects.skips(ledger) == [Skip(ONE), Skip(OTHER)]
    assert ledger.pending == GRID.num_batches - 2
    ledger.advance(1)
    assert suspects.skips(ledger) == []
    ledger.advance(0)
    assert suspects.skips(ledger) == [Skip(ONE), Skip(OTHER)]
