"""Tests of memory growth, which counts after the start-up of a process."""

from __future__ import annotations

import pytest

from tests.benchmarks.soak import Growth, Sample, findings

START_UP = [Sample(0.0, 10.0, 6.0, 5.0), Sample(30.0, 60.0, 55.0, 50.0)]


def growing(mb_per_s: float) -> list[Sample]:
    times = range(60, 660, 5)
    return [*START_UP, *(Sample(time, 100.0, 90.0, 80 + mb_per_s * (time - 60)) for time in map(float, times))]


def test_a_straight_line_is_found() -> None:
    assert Growth.of([0.0, 5.0, 10.0], [1.0, 2.0, 3.0]) == pytest.approx((2, 720))


def test_a_single_sample_out_of_line_is_no_growth() -> None:
    assert Growth.of([float(time) for time in range(24)], [50.0] * 23 + [90.0]).more_mb == pytest.approx(20)
    assert Growth.of([float(time) for time in range(36)], [50.0] * 35 + [90.0]).more_mb == 0


def test_the_server_is_judged_and_the_most_grown_worker_shown() -> None:
    turn = {"driver": growing(0), "server 1": growing(0.02), "worker 1": growing(0), "worker 2": growing(0.1)}
    found = {one.measure: one for one in findings([turn], settled_s=60.0)}
    assert found["server's own memory, growth after start-up"].met is False
    assert found["server's own memory, slope"].value == pytest.approx(72)
    assert found["worker's own memory, slope"].value == pytest.approx(360)
    assert found["driver's own memory, growth after start-up"].met is None
    assert found["server's RSS, growth after start-up"].value == 0
