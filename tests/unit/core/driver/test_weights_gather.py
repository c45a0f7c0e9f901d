"""Each request gets its weights once, or is given up once."""

from __future__ import annotations

import numpy as np

from psgd.core.driver.weights_gather import WeightsGather

ONE = np.ones(2, np.float32)
TWO = np.full(3, 2, np.float32)


def test_parts_are_given_in_their_order_when_the_last_is_there() -> None:
    gather = WeightsGather(2)
    request = gather.begin("worker-0", 3)
    assert gather.add(request, 1, TWO) is None
    parts = gather.add(request, 0, ONE)
    assert parts is not None
    assert [part is given for part, given in zip(parts, (ONE, TWO), strict=True)] == [True, True]
    assert not gather.give_up(request)


def test_two_servers_that_refuse_give_it_up_once() -> None:
    gather = WeightsGather(2)
    request = gather.begin("worker-0", 3)
    assert [gather.give_up(request), gather.give_up(request)] == [True, False]


def test_a_part_of_what_was_given_up_is_none_of_what_is_asked_anew() -> None:
    gather = WeightsGather(2)
    before = gather.begin("worker-0", 3)
    assert gather.add(before, 0, ONE) is None
    assert gather.give_up(before)
    anew = gather.begin("worker-0", 3)
    assert gather.add(before, 1, TWO) is None
    assert gather.add(anew, 1, TWO) is None
    assert gather.give_up(anew)


def test_a_lost_partition_ends_those_that_lack_its_part() -> None:
    gather = WeightsGather(2)
    has = gather.begin("worker-0", 3)
    lacks = gather.begin("worker-1", None)
    assert gather.add(has, 1, TWO) is None
    assert gather.lost(1) == [lacks]
    assert gather.lost(1) == []
    assert gather.add(has, 0, ONE) is not None
