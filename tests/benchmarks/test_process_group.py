"""Tests of process groups and of the shared counter."""

from __future__ import annotations

from ctypes import c_int64
from itertools import chain
from multiprocessing.sharedctypes import Synchronized

import pytest

from tests.benchmarks.process_group import SPAWN, process_group, run_process_group, take


def taken(rank: int, counter: Synchronized[int]) -> list[int]:
    return [take(counter) for _ in range(100)]


def broken(rank: int) -> None:
    raise SystemExit(3)


def test_no_number_is_taken_twice() -> None:
    answers = run_process_group(3, taken, SPAWN.Value(c_int64, 0))
    assert [len(answer) for answer in answers] == [100] * 3
    assert sorted(chain(*answers)) == list(range(300))


def test_a_process_without_an_answer_ends_the_benchmark() -> None:
    with process_group(1, broken) as answers, pytest.raises(SystemExit):
        answers()
