"""Tests of the recoveries in a run's events, and of the figures."""

from __future__ import annotations

import pytest

from tests.benchmarks.recovery import SERVER, WORKER, Recovery, findings, recovered


def test_a_successor_is_the_next_worker_that_is_started() -> None:
    happened = [
        {"time": 0.0, "event": "worker_started", "worker": "worker-0"},
        {"time": 1.0, "event": "worker_up", "worker": "worker-0"},
        {"time": 10.0, "event": "worker_lost", "worker": "worker-0"},
        {"time": 10.5, "event": "worker_started", "worker": "worker-1"},
        {"time": 12.0, "event": "worker_up", "worker": "worker-1"},
        {"time": 15.0, "event": "server_restored", "seconds": 3.0},
        {"time": 20.0, "event": "worker_lost", "worker": "worker-1"},
        {"time": 20.5, "event": "worker_started", "worker": "worker-2"},
    ]
    assert recovered(happened) == (2.0, 3.0)


def test_costs_are_judged_by_medians() -> None:
    turns = {
        "undisturbed": [Recovery(100.0, 0, 0.0, ())] * 3,
        WORKER: [Recovery(rate, 4, 4.0, (1.0, 2.0)) for rate in (70.0, 85.0, 90.0)],
        SERVER: [Recovery(50.0, 2, 40.0, (5.5,))] * 3,
    }
    assert [(one.value, one.met) for one in findings(turns)] == [
        (pytest.approx(0.85), True),
        (1.0, True),
        (1.5, True),
        (5.5, False),
        (0.5, None),
    ]


def test_what_did_not_happen_has_no_figure() -> None:
    turns = {victim: [Recovery(1.0, 0, 0.0, ())] for victim in ("undisturbed", WORKER, SERVER)}
    assert [one.value for one in findings(turns)] == [1.0, None, None, None, 1.0]
