"""Tests of the comparison between the remaining speed and the best possible one."""

from __future__ import annotations

import pytest

from tests.benchmarks.stragglers import LEFT, TARGET, findings


def test_three_workers_and_a_tenth_are_left() -> None:
    assert pytest.approx(3.1 / 4) == LEFT
    assert pytest.approx(0.95 * 3.1 / 4) == TARGET


def test_psgd_is_judged_and_the_others_are_shown() -> None:
    rates = {"psgd": (1600.0, 1240.0), "psgd epochs": (6400.0, 3200.0), "ddp": (1600.0, 160.0)}
    turns = {
        f"{way} {speed}": [rate] for way, of in rates.items() for speed, rate in zip(("even", "slow"), of, strict=True)
    }
    assert [(one.value, one.met) for one in findings(turns)] == [(0.775, True), (0.5, None), (0.1, None)]
