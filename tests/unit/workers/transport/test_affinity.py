from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from psgd_workers.transport import affinity
from psgd_workers.transport.affinity import NOWHERE, allowed_processors, current_processor, run_on, set_patient

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux' scheduler")


@pytest.fixture(autouse=True)
def allowed() -> Iterator[set[int]]:
    before = os.sched_getaffinity(0)
    policy = os.sched_getscheduler(0)
    yield before
    os.sched_setscheduler(0, policy, os.sched_param(0))
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
    monkeypatch.setattr(affinity, "_getcpu", None)
    monkeypatch.delattr(os, "sched_getaffinity")
    assert current_processor() == NOWHERE
    assert allowed_processors() == set()
    monkeypatch.undo()


def test_patience_is_of_one_thread_and_can_be_ended() -> None:
    before = os.sched_getscheduler(0)
    assert before == os.SCHED_OTHER
    with ThreadPoolExecutor(1) as thread:
        for patient, policy in [(True, os.SCHED_BATCH), (False, os.SCHED_OTHER)]:
            thread.submit(set_patient, patient).result()
            assert thread.submit(os.sched_getscheduler, 0).result() == policy
            assert os.sched_getscheduler(0) == before


def test_a_policy_that_somebody_chose_is_left_alone() -> None:
    def under_another() -> tuple[int, int]:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        set_patient(patient=True)
        between = os.sched_getscheduler(0)
        set_patient(patient=False)
        return between, os.sched_getscheduler(0)

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(under_another).result() == (os.SCHED_IDLE, os.SCHED_IDLE)


def test_where_no_policy_can_be_chosen_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "not here")

    before = os.sched_getscheduler(0)
    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    set_patient(patient=True)
    monkeypatch.delattr(os, "SCHED_BATCH")
    set_patient(patient=True)
    monkeypatch.undo()
    assert os.sched_getscheduler(0) == before
