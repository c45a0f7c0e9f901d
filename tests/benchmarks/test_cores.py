"""Tests of a message between two cores, and of machines on which it cannot be measured."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

from tests.benchmarks.cores import compiled_exchange, round_trip_ns, shown

PROCESSORS = sorted(os.sched_getaffinity(0))


@pytest.fixture
def _nothing_compiled() -> Iterator[None]:
    compiled_exchange.cache_clear()
    yield
    compiled_exchange.cache_clear()


@pytest.mark.skipif(len(PROCESSORS) < 2, reason="needs two cores")
def test_the_threads_take_turns_and_leave_this_thread_on_its_cores() -> None:
    assert (round_trip_ns() or 0) > 0
    assert sorted(os.sched_getaffinity(0)) == PROCESSORS


def test_one_core_has_no_other_to_write_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert round_trip_ns() is None


@pytest.mark.usefixtures("_nothing_compiled")
def test_without_numba_there_is_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setitem(sys.modules, "numba", None)
    assert round_trip_ns() is None


def test_only_a_time_is_shown() -> None:
    assert shown(412.3) == "cores 412 ns apart"
    assert shown(None) == ""
