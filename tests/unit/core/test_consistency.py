from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from psgd.core.consistency import Async, Bsp, build_consistency
from psgd.spec import AsyncConsistency, BspConsistency
from psgd_workers.messages import BatchId, Version
from tests.unit.core.jobs import push

NOW = Version(2, 7)
READS = [Version(2, 7), Version(2, 6), Version(1, 7), Version(1, 3)]

some_workers = st.frozensets(st.sampled_from("abcd"))


def test_async_admits_any_staleness_and_bsp_none() -> None:
    gradients = [push(BatchId(0, 0, 0), read) for read in READS]
    assert [Async().admits(gradient, NOW) for gradient in gradients] == [True] * 4
    assert [Bsp().admits(gradient, NOW) for gradient in gradients] == [True, False, False, False]


@given(some_workers, some_workers, st.booleans())
def test_async_rounds_close_with_every_push(heard: frozenset[str], live: frozenset[str], outstanding: bool) -> None:
    assert Async().closes(heard, live, outstanding) == (heard != frozenset())


@given(some_workers, some_workers, st.booleans())
def test_bsp_rounds_wait_for_the_live_while_work_is_left(
    heard: frozenset[str], live: frozenset[str], outstanding: bool
) -> None:
    waits_for = [worker for worker in live if worker not in heard]
    assert Bsp().closes(heard, live, outstanding) == (bool(heard) and not (waits_for and outstanding))


def test_the_spec_decides_the_mode() -> None:
    assert isinstance(build_consistency(AsyncConsistency()), Async)
    assert isinstance(build_consistency(BspConsistency(mode="bsp")), Bsp)
