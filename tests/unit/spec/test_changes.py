from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psgd.errors import SpecError
from psgd.spec import BspConsistency, CosineSchedule, RingmasterConsistency, SspConsistency
from psgd.spec.changes import change_settings, change_workers, override_spec
from tests.support.minimal_specs import mode, spec


def test_what_can_change_is_changed_and_nothing_else() -> None:
    before = spec(consistency=mode("ssp"), optimizer={"lr": 0.1, "momentum": 0.9})
    changes = [
        "consistency.s=3",
        "optimizer.lr=1e-2",
        "optimizer.schedule={name: cosine, epochs: 5}",
        "optimizer.max_grad_norm=1",
        "optimizer.clip_value=2",
    ]
    after = change_settings(before, changes)
    assert after.consistency == SspConsistency(mode="ssp", s=3)
    optimizer = before.optimizer.model_copy(
        update={
            "lr": 0.01,
            "schedule": CosineSchedule(name="cosine", epochs=5),
            "max_grad_norm": 1.0,
            "clip_value": 2.0,
        }
    )
    assert after == before.model_copy(update={"consistency": after.consistency, "optimizer": optimizer})


def test_another_mode_drops_the_old_ones_fields() -> None:
    after = change_settings(spec(consistency=mode("ssp", s=3)), ["consistency.mode=bsp"])
    assert after.consistency == BspConsistency(mode="bsp")


def test_a_modes_own_fields_are_given_after_it() -> None:
    before = spec(consistency=mode("k_sync", late="discard"))
    after = change_settings(before, ["consistency.mode=ringmaster", "consistency.r=2"])
    assert after.consistency == RingmasterConsistency(mode="ringmaster", r=2)
    with pytest.raises(SpecError, match=r"consistency\.r: missing"):
        change_settings(before, ["consistency.mode=ringmaster"])


def test_the_same_mode_again_keeps_its_fields() -> None:
    after = change_settings(spec(consistency=mode("ssp", s=3)), ["consistency.mode=ssp", "optimizer.lr=0.2"])
    assert after.consistency == SspConsistency(mode="ssp", s=3)


def test_the_rate_is_changed_under_either_name() -> None:
    assert change_settings(spec(), ["optimizer.learning_rate=0.2"]).optimizer.lr == 0.2
    assert change_settings(spec(optimizer={"learning_rate": 0.1}), ["optimizer.lr=0.2"]).optimizer.lr == 0.2


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ("seed=1", "seed"),
        ("optimizer.momentum=0.5", r"optimizer\.momentum"),
        ("optimizer.name=adam", "optimizer"),
        ("correction.name=staleness_lr", "correction"),
        ("compression.name=int8", "compression"),
        ("scaling.workers=2", r"scaling\.workers"),
        ("scaling.servers=2", r"scaling\.servers"),
        ("data.batch_size=8", r"data\.batch_size"),
        ("model.kind=mlp", "model"),
        ("run.epochs=9", r"run\.epochs"),
        ("checkpoint.keep=1", r"checkpoint\.keep"),
        ("failure.timeout_s=1", r"failure\.timeout_s"),
        ("name=other", "name"),
    ],
)
def test_what_cannot_change_is_named(change: str, field: str) -> None:
    with pytest.raises(SpecError, match=f"^{field} cannot change while the job runs: only consistency, and the opt"):
        change_settings(spec(), ["optimizer.lr=0.2", change])


def test_a_change_of_nothing_is_refused() -> None:
    with pytest.raises(
        SpecError, match=r"optimizer\.lr=0\.1 consistency\.mode=async: the job runs with these settings already"
    ):
        change_settings(spec(), ["optimizer.lr=0.1", "consistency.mode=async"])


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (["consistency.mode=k_sync", "consistency.k=9"], "consistency.k is 9, but the job has 4 workers"),
        (["consistency.mode=bsp"], "correction staleness_lr does nothing in mode bsp"),
        (["optimizer.lr=0"], "expected a number above 0, not 0"),
        (["consistency.mode=lockstep"], "lockstep"),
        (["consistency.slack=1"], "unknown field"),
    ],
)
def test_a_change_is_checked_like_a_job(changes: list[str], fault: str) -> None:
    with pytest.raises(SpecError, match=fault):
        change_settings(spec(consistency=mode("async"), correction={"name": "staleness_lr"}), changes)


@pytest.mark.parametrize(
    ("scaling", "changes", "fault"),
    [
        ({"servers": 2}, ["consistency.mode=ringleader"], "scaling.servers is 2, but mode ringleader chooses"),
        ({"pipeline": 1}, ["consistency.mode=bsp"], "scaling.pipeline is 1, but mode bsp makes workers wait"),
    ],
)
def test_a_running_job_keeps_its_servers_and_its_pipeline(
    scaling: dict[str, int], changes: list[str], fault: str
) -> None:
    with pytest.raises(SpecError, match=fault):
        change_settings(spec(scaling=scaling), changes)


LOCAL = ["consistency.mode=local", "consistency.h=4", "consistency.lr=0.1"]


@pytest.mark.parametrize(
    ("before", "changes"),
    [
        ("async", LOCAL),
        ("local", ["consistency.mode=async"]),
        ("local", ["consistency.h=5"]),
        ("local", ["consistency.lr=0.2"]),
    ],
)
def test_batches_of_local_steps_stay_what_they_are(before: str, changes: list[str]) -> None:
    with pytest.raises(SpecError, match="workers are started with their local steps"):
        change_settings(spec(consistency=mode(before)), changes)


@pytest.mark.parametrize(
    ("before", "changes"),
    [
        ("async", ["consistency={mode: ringmaster, r: 3, stop: true}"]),
        ("ringmaster", ["consistency.stop=true"]),
    ],
)
def test_workers_that_are_running_cannot_be_told_to_stop(before: str, changes: list[str]) -> None:
    with pytest.raises(SpecError, match="workers are started with their local steps"):
        change_settings(spec(consistency=mode(before)), changes)


def test_local_steps_may_become_synchronous() -> None:
    assert change_settings(spec(consistency=mode("local")), ["consistency.synchronous=true"]).worker_options.local


# Settings from outside may be anything

HOSTILE = [
    "optimizer.lr=2001-99-99",
    "optimizer.lr=!!float abc",
    "optimizer.lr=!!bool 7",
    "optimizer.lr=" + "[" * 5000,
    "optimizer.lr=" + "1" * 5000,
    "optimizer.lr=" + "1" * 40_000 + "x",
    "optimizer={7: x}",
    "optimizer={lr: 0.2, 7: x}",
    "consistency={7: x}",
    "model={kind: python, path: 'a:b', kwargs: {7: x}}",
    "run={epochs: 3, 2001-12-14: x}",
    "7=x",
    "consistency={mode: [ssp]}",
    "consistency={mode: {a: 1}}",
    "consistency={mode: null}",
    "consistency=[[[]]]",
    "optimizer={lr: [&a [1], *a, *a]}",
    "optimizer=[&a [&b [&c [*c]]]]",
    'optimizer.lr="\\U00110000"',
    'optimizer.name="\\ud800"',
    "optimizer.lr=\ud800",
    ".".join(["optimizer"] * 5000) + "=1",
    "optimizer.schedule.name.a.b=1",
    "optimizer.lr",
    "=",
    "..=1",
    "",
    "model.kwargs.a=1",
    "data=null",
    "run.epochs=1e400",
    "scaling.workers=[1]",
    "optimizer={<<: {lr: 3}, name: [1, 2]}",
    "optimizer={<<: 3}",
]


@pytest.mark.parametrize("setting", HOSTILE, ids=lambda setting: ascii(setting[:40]))
def test_a_setting_is_changed_or_refused_with_a_reason(setting: str) -> None:
    with pytest.raises(SpecError) as refused:
        change_settings(spec(), [setting])
    assert 20 < len(str(refused.value)) < 1500


NAMES = ["name", "lr", "mode", "s", "schedule", "kind", "workers", "min", "max", "7", "str", "ssp"]
LEAVES = st.none() | st.booleans() | st.integers(-3, 10**30) | st.floats() | st.sampled_from([*NAMES, "adam", ""])
YAML = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=8,
)
FIELDS = """
model model.kind data data.dataset optimizer optimizer.lr optimizer.schedule consistency consistency.mode correction
compression scaling scaling.workers scaling.ports run run.target checkpoint failure name seed version
"""


@given(st.sampled_from(FIELDS.split()), YAML)
def test_any_value_of_any_field_is_taken_or_refused(field: str, value: Any) -> None:
    for change in (override_spec, change_settings):
        try:
            change(spec(), [f"{field}={json.dumps(value)}"])
        except SpecError as refused:
            assert "psgd" not in str(refused)  # noqa: PT017
            assert not re.search(r"[a-z](Spec|Config|Optimizer|Consistency|Schedule|Range|Model|Data)\b", str(refused))  # noqa: PT017


@pytest.mark.parametrize(
    "workers", ["²", "٣", "", "-1", "+3", "1.0", "0x2", "many", "1" * 5000, "1" * 9, "0", "3\n", " 3"]
)
def test_a_number_of_workers_is_decimal_digits(workers: str) -> None:
    with pytest.raises(SpecError) as refused:
        change_workers(spec(), workers)
    assert len(str(refused.value)) < 500


def test_the_number_of_workers_is_changed() -> None:
    assert change_workers(spec(), "3").scaling.workers == 3
    assert change_workers(spec(scaling={"workers": {"min": 1, "max": 2}}), "007").scaling.workers == 7


def test_a_setting_leaves_the_job_as_it_was() -> None:
    before = spec(model={"kind": "python", "path": "a:b", "kwargs": {"x": {"y": 1}}})
    kept = before.model_dump()
    after = override_spec(before, ["model.kwargs.x.y=2", "model.kwargs.z=3"])
    assert after.model.model_dump()["kwargs"] == {"x": {"y": 2}, "z": 3}
    assert before.model_dump() == kept
