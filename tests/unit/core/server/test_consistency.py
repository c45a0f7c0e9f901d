from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from psgd.core.server.aggregators import Contribution, StepMember
from psgd.core.server.consistency import Consistency, Round, build_consistency
from psgd.core.server.live_worker import LiveWorker
from psgd.spec import ConsistencySpec
from psgd_workers.messages import BatchId, Outcome

some_workers = st.frozensets(st.sampled_from("abcd"))
REFUSED = (Outcome.REQUEUED, Outcome.DISCARDED)


def mode(name: str, **fields: Any) -> Consistency:
    spec: ConsistencySpec = TypeAdapter(ConsistencySpec).validate_python({"mode": name, **fields})
    return build_consistency(spec)


def state(collected: int = 0, pushed: Any = "", live: Any = "", outstanding: bool = True) -> Round:
    clocks = live if isinstance(live, dict) else dict.fromkeys(live, 0)
    return Round(collected, set(pushed), {name: LiveWorker(clock) for name, clock in clocks.items()}, outstanding)


@pytest.mark.parametrize(
    ("name", "fields", "admitted"),
    [
        ("async", {}, [True, True, True, True]),
        ("ssp", {"s": 0}, [True, True, True, True]),
        ("softsync", {"s": 2}, [True, True, True, True]),
        ("buffered", {"k": 2}, [True, True, True, True]),
        ("local", {"h": 2, "lr": 0.1}, [True, True, True, True]),
        ("ringleader", {}, [True, True, True, True]),
        ("ringmaster", {"r": 2}, [True, True, False, False]),
        ("ringmaster", {"r": 1}, [True, False, False, False]),
        ("bsp", {}, [True, False, False, False]),
        ("k_sync", {"k": 2}, [True, False, False, False]),
        ("backup", {"b": 1}, [True, False, False, False]),
        ("rennala", {"s": 3}, [True, False, False, False]),
        ("malenia", {"s": 3}, [True, False, False, False]),
    ],
)
def test_what_is_admitted_by_staleness(name: str, fields: dict[str, Any], admitted: list[bool]) -> None:
    assert [mode(name, **fields).admits(staleness) for staleness in range(4)] == admitted


STOPPING = ("k_sync", "backup", "ringmaster", "rennala", "malenia")
MODES: list[dict[str, Any]] = [
    {"mode": "async"},
    {"mode": "bsp"},
    {"mode": "k_sync", "k": 2},
    {"mode": "backup", "b": 1},
    {"mode": "ssp", "s": 1},
    {"mode": "softsync", "s": 2},
    {"mode": "ringmaster", "r": 2},
    {"mode": "rennala", "s": 3},
    {"mode": "malenia", "s": 3},
    {"mode": "ringleader"},
    {"mode": "buffered", "k": 2},
    {"mode": "local", "h": 2, "lr": 0.1},
    {"mode": "local", "h": 2, "lr": 0.1, "synchronous": True},
]


@pytest.mark.parametrize("fields", MODES, ids=lambda fields: f"{fields['mode']}{fields.get('synchronous', '')}")
def test_a_mode_behaves_as_its_spec_says(fields: dict[str, Any]) -> None:
    spec: ConsistencySpec = TypeAdapter(ConsistencySpec).validate_python(fields)
    built = build_consistency(spec)
    ahead = state(1, "a", {"a": 9, "b": 0})
    assert built.admits(1) == (not spec.traits.fresh_only)
    assert built.waiting(ahead)("a") == spec.traits.workers_wait
    several = built.batches_per_update(4) > 1
    assert spec.traits.mixes_staleness == (several and built.admits(9) and not spec.traits.chooses_gradients)


@pytest.mark.parametrize("fields", [fields | {"stop": True} for fields in MODES if fields["mode"] in STOPPING])
def test_a_worker_stops_at_the_staleness_that_is_refused(fields: dict[str, Any]) -> None:
    spec: ConsistencySpec = TypeAdapter(ConsistencySpec).validate_python(fields)
    assert spec.stop_at is not None
    built = build_consistency(spec)
    assert (built.admits(spec.stop_at - 1), built.admits(spec.stop_at)) == (True, False)


@pytest.mark.parametrize("name", ["async", "ssp", "ringmaster", "local"])
@given(collected=st.integers(0, 1), pushed=some_workers, live=some_workers, outstanding=st.booleans())
def test_modes_of_single_gradients_step_on_every_one(
    name: str, collected: int, pushed: frozenset[str], live: frozenset[str], outstanding: bool
) -> None:
    fields = {"ssp": {"s": 1}, "ringmaster": {"r": 2}, "local": {"h": 1, "lr": 1}}.get(name, {})
    assert mode(name, **fields).closes(state(collected, pushed, live, outstanding)) == (collected == 1)


@given(some_workers, some_workers, st.booleans())
def test_bsp_rounds_wait_for_the_live_while_work_is_left(
    pushed: frozenset[str], live: frozenset[str], outstanding: bool
) -> None:
    waits_for = [worker for worker in live if worker not in pushed]
    round_ = state(len(pushed), pushed, live, outstanding)
    assert mode("bsp").closes(round_) == (bool(pushed) and not (waits_for and outstanding))


@given(some_workers, some_workers, st.booleans(), st.integers(1, 5))
def test_k_sync_rounds_close_with_k_gradients_or_like_bsp(
    pushed: frozenset[str], live: frozenset[str], outstanding: bool, k: int
) -> None:
    round_ = state(len(pushed), pushed, live, outstanding)
    assert mode("k_sync", k=k).closes(round_) == (len(pushed) >= k or mode("bsp").closes(round_))


def test_backup_does_without_b_of_the_live() -> None:
    backup = mode("backup", b=1)
    assert not backup.closes(state(1, "a", "abc"))
    assert backup.closes(state(2, "ab", "abc"))
    assert backup.closes(state(1, "a", "ab"))  # one of three has left
    assert backup.closes(state(1, "a", "a"))


@pytest.mark.parametrize(("name", "fields"), [("bsp", {}), ("k_sync", {"k": 2}), ("backup", {"b": 1})])
def test_who_was_heard_in_a_round_waits_for_it(name: str, fields: dict[str, Any]) -> None:
    waits = mode(name, **fields).waiting(state(1, "a", "abc"))
    assert [waits(worker) for worker in "abc"] == [True, False, False]


def test_only_in_bsp_does_a_late_worker_belong_to_the_round() -> None:
    for outcome in Outcome:
        assert mode("bsp").belongs(outcome)
        assert mode("k_sync", k=2).belongs(outcome) == (outcome not in REFUSED)
        assert not mode("async").belongs(outcome)


@given(st.dictionaries(st.sampled_from("abcd"), st.integers(0, 9), min_size=1), st.integers(0, 4), st.booleans())
def test_ssp_holds_back_who_is_more_than_s_ahead(clocks: dict[str, int], s: int, outstanding: bool) -> None:
    waits = mode("ssp", s=s).waiting(state(0, "", clocks, outstanding))
    ahead = {worker for worker, clock in clocks.items() if clock - min(clocks.values()) > s}
    assert {worker for worker in "abcd" if waits(worker)} == (ahead if outstanding else set())


@pytest.mark.parametrize(("s", "live", "size"), [(1, 4, 4), (2, 4, 2), (3, 4, 1), (4, 4, 1), (2, 1, 1), (2, 0, 1)])
def test_softsync_steps_on_n_over_s_gradients(s: int, live: int, size: int) -> None:
    softsync = mode("softsync", s=s)
    workers = "abcd"[:live]
    assert [softsync.closes(state(n, "", workers)) for n in range(size + 1)] == [False] * size + [True]


@pytest.mark.parametrize(("name", "fields"), [("rennala", {"s": 3}), ("buffered", {"k": 3})])
def test_collecting_modes_step_on_so_many_gradients_or_at_an_end(name: str, fields: dict[str, Any]) -> None:
    collecting = mode(name, **fields)
    assert [collecting.closes(state(n, "", "ab")) for n in range(4)] == [False, False, False, True]
    assert [collecting.closes(state(n, "", "ab", outstanding=False)) for n in range(3)] == [False, True, True]


def test_buffered_weighs_by_the_root_of_the_staleness() -> None:
    assert [mode("buffered", k=3).weight(staleness) for staleness in (0, 3, 8)] == [1, 1 / 2, 1 / 3]
    assert mode("buffered", k=3).weight(1) == 1 / sqrt(2)
    assert {mode("softsync", s=1).weight(staleness) for staleness in range(9)} == {1.0}


@pytest.mark.parametrize(
    ("name", "fields", "batches"),
    [
        ("async", {}, 1),
        ("bsp", {}, 6),
        ("k_sync", {"k": 4}, 4),
        ("backup", {"b": 1}, 5),
        ("softsync", {"s": 2}, 3),
        ("rennala", {"s": 8}, 8),
        ("buffered", {"k": 5}, 5),
        ("ringleader", {}, 1),
    ],
)
def test_how_many_batches_six_workers_need_for_an_update(name: str, fields: dict[str, Any], batches: int) -> None:
    assert mode(name, **fields).batches_per_update(6) == batches


@pytest.mark.parametrize(("name", "fields"), [("malenia", {"s": 2}), ("ringleader", {}), ("rennala", {"s": 2})])
def test_to_ask_whether_a_round_closes_changes_nothing(name: str, fields: dict[str, Any]) -> None:
    asked = mode(name, **fields)
    collected = asked.aggregator(2, 2)
    for number, worker in enumerate("ab"):
        values = np.ones(2, np.float32)
        collected.add(Contribution(worker, BatchId(0, 0, number), StepMember(0, 1), values, 1.0, 1.0))
    before = collected.state()[1]
    for live in ("", "ab", "abc"):
        asked.closes(state(2, "ab", live))
        asked.waiting(state(2, "ab", live))("a")
        assert collected.state()[1] == before
