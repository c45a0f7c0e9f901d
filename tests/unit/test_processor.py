from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from psgd_workers import processor
from psgd_workers.processor import NOWHERE, allowed_processors, current_processor, run_on

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux' scheduler")


@pytest.fixture(autouse=True)
def allowed() -> Iterator[set[int]]:
    before = os.sched_getaffinity(0)
    yield before
    os.sched_setaffinity(0, before)


def test_a_thread_runs_where_it_is_told_to(allowed: set[int]) -> None:
    assert allowed_processors() == allowed
    for number in sorted(allowed):
        run_on({number})
        assert allowed_processors() == {number}
        assert current_processor() == number


def test_a_processor_that_is_not_there_changes_nothing(allowed: set[int]) -> None:
    run_on({NOWHERE})
    assert allowed_processors() == allowed


def test_where_the_system_does_not_say_a_thread_is_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "_getcpu", None)
    monkeypatch.delattr(os, "sched_getaffinity")
    assert current_processor() == NOWHERE
    assert allowed_processors() == set()
    monkeypatch.undo()
