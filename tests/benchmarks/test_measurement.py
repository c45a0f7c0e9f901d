"""Tests of the measured span: the clock starts with the first update and stops with the last."""

from __future__ import annotations

import pytest

from tests.benchmarks.measurement import Measurement, Span, repeat


def test_updates_are_repeated_while_going_and_counted() -> None:
    made: list[int] = []
    span = repeat(lambda: made.append(0), lambda span: span.updates < 5)
    assert span.updates == len(made) == 5
    assert span.last >= span.first


def test_spans_of_processes_are_one_span_from_the_first_update_to_the_last() -> None:
    assert Span.over([Span(3, 1.0, 4.0), Span(5, 0.5, 3.0)]) == Span(8, 0.5, 4.0)


def test_the_rate_leaves_out_the_update_that_starts_the_clock() -> None:
    assert Measurement.of("hogwild", Span(101, 10.0, 12.0), 0.9).updates_per_s == pytest.approx(50)
