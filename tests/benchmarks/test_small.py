"""Tests of the figures from the server's progress."""

from __future__ import annotations

from tests.benchmarks.bare import Mark
from tests.benchmarks.small import findings


def test_the_rate_is_judged_on_both_lanes() -> None:
    slow = Mark(2.0, 1.0, 20_000)
    fast = Mark(1.0, 0.5, 30_000)
    shm, cost, tcp, _ = findings({"shm": [slow, fast, fast], "tcp": [slow]})
    assert (shm.value, shm.met, shm.turns) == (30_000, False, (10_000, 30_000, 30_000))
    assert cost.value == 0.5 / 30_000 * 1e6
    assert (tcp.value, tcp.met) == (10_000, False)
