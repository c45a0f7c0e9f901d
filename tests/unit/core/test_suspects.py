from __future__ import annotations

from psgd.core.suspects import Suspects
from psgd_workers.messages import BatchId

ONE, OTHER = BatchId(0, 0, 1), BatchId(0, 0, 2)


def test_a_batch_that_workers_die_at_is_poison_after_so_many() -> None:
    suspects = Suspects(3)
    assert [suspects.died(ONE) for _ in range(4)] == [False, False, True, False]
    assert not suspects.died(OTHER)
    assert suspects.poison == {ONE}


def test_rejections_are_counted_by_the_servers_whose_counts_may_start_again() -> None:
    suspects = Suspects(3)
    assert suspects.rejected([(ONE, 2)]) == []
    assert suspects.rejected([(ONE, 2), (OTHER, 1)]) == []  # another partition counts the same pushes
    assert suspects.rejected([(ONE, 1)]) == []  # a restored one began anew
    assert suspects.rejected([(ONE, 3)]) == [ONE]
    assert suspects.rejected([(ONE, 4)]) == []


def test_deaths_and_rejections_add_up() -> None:
    suspects = Suspects(3)
    suspects.rejected([(ONE, 2)])
    assert suspects.died(ONE)
    assert suspects.tries(ONE) == 3
