"""Tests of the figures from rates and CPU times."""

from __future__ import annotations

from tests.benchmarks.bare import Mark
from tests.benchmarks.servers import findings

MARKS = {
    "small": {4: [Mark(10.0, 0.2, 2000)], 64: [Mark(10.0, 0.24, 2000)]},
    "dense": {4: [Mark(10.0, 0.4, 2000)], 64: [Mark(10.0, 0.42, 2000)]},
}


def test_two_servers_are_over_one_and_many_workers_over_few() -> None:
    servers, small, *small_costs, dense, few, many = findings({1: [900.0], 2: [855.0]}, MARKS)
    assert (servers.value, servers.met) == (0.95, True)
    assert [round(ratio.value or 0, 6) for ratio in (small, dense)] == [1.2, 1.05]
    assert [small.met, dense.met] == [False, True]
    assert [round(cost.value or 0) for cost in (*small_costs, few, many)] == [100, 120, 200, 210]


def test_runs_that_failed_leave_a_ratio_unmeasured() -> None:
    assert findings({1: [900.0], 2: []}, MARKS)[0].value is None
