"""Tests of the plain NumPy round and of the ratios to it."""

from __future__ import annotations

import numpy as np

from tests.benchmarks.transfer import RATE, InOneProcess, findings


def test_a_plain_round_is_a_step() -> None:
    plain = InOneProcess(1000)
    plain.gradient[:] = np.random.default_rng(0).standard_normal(1000)
    plain.round()
    np.testing.assert_array_equal(plain.received, np.zeros(1000, np.float32) - RATE * plain.gradient)


def test_seconds_are_over_the_plain_ones() -> None:
    turns = {"shm": [0.2], "tcp": [0.7], "authenticated": [0.77], "plain": [0.1], "loopback": [0.3]}
    found = findings(turns, size=25_000_000)
    assert found[0].measure.startswith("push + weights of 100 MB on shm")
    expected = [(2.0, False), (0.7 / 0.1, False), (0.77 / 0.7, None), (0.3 / 0.1, None)]
    assert [(one.value, one.met) for one in found] == expected
