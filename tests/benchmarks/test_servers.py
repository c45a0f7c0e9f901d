"""Tests of the figures from rates and CPU times."""

from __future__ import annotations

from tests.benchmarks.bare import Mark
from tests.benchmarks.servers import findings

MARKS = {4: [Mark(10.0, 0.2, 2000)], 16: [Mark(10.0, 0.21, 2000)], 64: [Mark(10.0, 0.24, 2000)]}


def test_two_servers_are_over_one_and_many_workers_over_few() -> None:
    servers, workers, *costs = findings({1: [900.0], 2: [855.0]}, MARKS)
    assert (servers.value, servers.met) == (0.95, True)
    assert workers.value is not None
    assert (round(workers.value, 6), workers.met) == (1.2, False)
    assert [round(cost.value or 0) for cost in costs] == [100, 105, 120]


def test_runs_that_failed_leave_a_ratio_unmeasured() -> None:
    assert findings({1: [900.0], 2: []}, MARKS)[0].value is None
