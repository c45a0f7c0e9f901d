"""Weights come together once, or are given up once."""

from __future__ import annotations

import numpy as np

from psgd.core.driver.weights_gather import Gathering

ONE, TWO = np.ones(2, np.float32), np.full(3, 2, np.float32)


def test_parts_are_given_in_their_order_when_the_last_is_there() -> None:
    gathering = Gathering(2)
    asked = gathering.begin("worker-0", 3)
    assert gathering.add(asked, 1, TWO) is None
    parts = gathering.add(asked, 0, ONE)
    assert parts is not None
    assert [part is given for part, given in zip(parts, (ONE, TWO), strict=True)] == [True, True]
    assert not gathering.give_up(asked)


def test_two_servers_that_refuse_give_it_up_once() -> None:
    gathering = Gathering(2)
    asked = gathering.begin("worker-0", 3)
    assert [gathering.give_up(asked), gathering.give_up(asked)] == [True, False]


def test_a_part_of_what_was_given_up_is_none_of_what_is_asked_anew() -> None:
    gathering = Gathering(2)
    before = gathering.begin("worker-0", 3)
    assert gathering.add(before, 0, ONE) is None
    assert gathering.give_up(before)
    anew = gathering.begin("worker-0", 3)
    assert gathering.add(before, 1, TWO) is None
    assert gathering.add(anew, 1, TWO) is None
    assert gathering.give_up(anew)


def test_a_lost_partition_ends_those_that_lack_its_part() -> None:
    gathering = Gathering(2)
    has, lacks = gathering.begin("worker-0", 3), gathering.begin("worker-1", None)
    assert gathering.add(has, 1, TWO) is None
    assert gathering.lost(1) == [lacks]
    assert gathering.lost(1) == []
    assert gathering.add(has, 0, ONE) is not None
