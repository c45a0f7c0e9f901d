from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from psgd_workers import processor
from psgd_workers.processor import NOWHERE, current_processor, follow

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux' scheduler")


@pytest.fixture(autouse=True)
def allowed() -> Iterator[set[int]]:
    before = os.sched_getaffinity(0)
    yield before
    os.sched_setaffinity(0, before)


def test_who_follows_runs_there(allowed: set[int]) -> None:
    for number in sorted(allowed):
        follow(number)
        assert os.sched_getaffinity(0) == {number}
        assert current_processor() == number


def test_nobody_follows_to_where_it_may_not_run(allowed: set[int]) -> None:
    follow(NOWHERE)
    assert os.sched_getaffinity(0) == allowed


def test_where_the_system_does_not_say_a_thread_is_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "_getcpu", None)
    assert current_processor() == NOWHERE
