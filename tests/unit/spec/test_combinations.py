from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from psgd_workers.spec import Int8Compression, LocalSteps, NoCompression, TopKCompression, WorkerOptions
from tests.support.minimal_specs import MINIMAL, MODES, mode, spec

CORRECTIONS: dict[str, dict[str, Any]] = {
    "staleness_lr": {},
    "delay_adaptive": {},
    "dc_asgd": {},
    "gap_aware": {},
    "dana": {"momentum": 0.9},
    "rescaled": {},
}
SINGLE = ("async", "ssp", "ringmaster")  # modes in which one gradient is one step
EVERYWHERE = {(mode, correction) for mode in SINGLE for correction in CORRECTIONS}
IN_A_MEAN = {
    (mode, correction)
    for mode in ("softsync", "buffered")
    for correction in ("staleness_lr", "delay_adaptive", "dc_asgd", "gap_aware")
}
OF_DIFFERENCES = {("local", correction) for correction in ("staleness_lr", "delay_adaptive", "rescaled")}
SENSIBLE = EVERYWHERE | IN_A_MEAN | OF_DIFFERENCES


def correction(name: str) -> dict[str, Any]:
    return {"name": name} | CORRECTIONS[name]


# Numbers of workers, and bounds


@pytest.mark.parametrize(
    ("fits", "wrong", "message"),
    [
        (mode("k_sync", k=4), mode("k_sync", k=5), "consistency.k is 5, but the job has 4 workers: lower k, or raise"),
        (
            mode("backup", b=3),
            mode("backup", b=4),
            "consistency.b is 4, but the job has 4 workers, and at least one must be left: lower b",
        ),
        (mode("softsync", s=4), mode("softsync", s=5), "consistency.s is 5, but the job has 4 workers"),
    ],
)
def test_a_mode_that_counts_workers_needs_enough(fits: dict[str, Any], wrong: dict[str, Any], message: str) -> None:
    assert spec(consistency=fits)
    with pytest.raises(ValidationError, match=message):
        spec(consistency=wrong)


@pytest.mark.parametrize("name", ["rennala", "malenia", "buffered", "ringmaster", "ssp"])
def test_a_mode_that_counts_gradients_may_ask_for_more_than_there_are_workers(name: str) -> None:
    (field,) = MODES[name]
    assert spec(consistency=mode(name, **{field: 99}))


@pytest.mark.parametrize(
    ("wrong", "least"),
    [
        (mode("k_sync", k=0), 1),
        (mode("backup", b=-1), 0),
        (mode("ssp", s=-1), 0),
        (mode("softsync", s=0), 1),
        (mode("ringmaster", r=0), 1),
        (mode("rennala", s=0), 1),
        (mode("malenia", s=0), 1),
        (mode("buffered", k=0), 1),
        (mode("local", h=0), 1),
    ],
    ids=lambda value: value["mode"] if isinstance(value, dict) else "",
)
def test_a_modes_number_has_a_least_value(wrong: dict[str, Any], least: int) -> None:
    with pytest.raises(ValidationError, match=f"greater than or equal to {least}"):
        spec(consistency=wrong)


@pytest.mark.parametrize(
    "name", ["k_sync", "backup", "ssp", "softsync", "ringmaster", "rennala", "malenia", "buffered"]
)
def test_a_modes_number_must_be_given(name: str) -> None:
    with pytest.raises(ValidationError, match="Field required"):
        spec(consistency={"mode": name})


@pytest.mark.parametrize("name", sorted(MODES))
def test_only_modes_that_refuse_say_what_becomes_of_it(name: str) -> None:
    refusing = name in ("k_sync", "backup", "ringmaster", "rennala", "malenia")
    if refusing:
        assert spec(consistency=mode(name, late="discard"))
    with pytest.raises(ValidationError, match="'requeue' or 'discard'" if refusing else "Extra inputs"):
        spec(consistency=mode(name, late="drop" if refusing else "discard"))


@pytest.mark.parametrize("ratio", [0, -0.1, 1.1])
def test_top_k_sends_some_share(ratio: float) -> None:
    with pytest.raises(ValidationError, match="greater than 0" if ratio <= 0 else "less than or equal to 1"):
        spec(compression={"name": "top_k", "ratio": ratio})
    assert spec(compression={"name": "top_k", "ratio": 1})


@pytest.mark.parametrize("momentum", [0, 1])
def test_danas_momentum_is_a_share(momentum: float) -> None:
    with pytest.raises(ValidationError, match="greater than 0" if momentum == 0 else "less than 1"):
        spec(correction={"name": "dana", "momentum": momentum})


# Corrections and modes


@pytest.mark.parametrize("name", sorted(MODES))
@pytest.mark.parametrize("correcting", sorted(CORRECTIONS))
def test_a_correction_goes_with_modes_in_which_it_does_something(name: str, correcting: str) -> None:
    if (name, correcting) in SENSIBLE:
        assert spec(consistency=mode(name), correction=correction(correcting))
        return
    with pytest.raises(ValidationError, match=rf"correction {correcting} .*mode {name}.*(drop it|use)"):
        spec(consistency=mode(name), correction=correction(correcting))


@pytest.mark.parametrize("name", sorted(MODES))
def test_no_correction_goes_with_every_mode(name: str) -> None:
    assert spec(consistency=mode(name), correction={"name": "none"})


@pytest.mark.parametrize(
    ("name", "correcting", "reason"),
    [
        ("bsp", "staleness_lr", "does nothing in mode bsp, where no gradient is stale: drop it, or use mode async"),
        ("malenia", "dc_asgd", "does nothing in mode malenia"),
        (
            "ringleader",
            "gap_aware",
            "does not fit mode ringleader, which weights all workers equally already: drop it",
        ),
        ("local", "dc_asgd", "is made for gradients, but mode local pushes sums of steps: use staleness_lr, or none"),
        ("local", "dana", "is made for gradients"),
        ("buffered", "dana", "needs one gradient per step, but mode buffered averages several: use mode async"),
        ("softsync", "rescaled", "needs one gradient per step"),
    ],
)
def test_the_refusal_says_why_and_what_to_do(name: str, correcting: str, reason: str) -> None:
    with pytest.raises(ValidationError, match=f"correction {correcting} {reason}"):
        spec(consistency=mode(name), correction=correction(correcting))


def test_synchronous_local_steps_are_never_stale() -> None:
    with pytest.raises(ValidationError, match="does nothing in mode local, where no gradient is stale"):
        spec(consistency=mode("local", synchronous=True), correction=correction("staleness_lr"))


@pytest.mark.parametrize(
    "optimizer", [{"lr": 0.1, "momentum": 0.9}, {"lr": 0.1, "name": "adam"}, {"lr": 0.1, "name": "adagrad"}], ids=str
)
def test_dana_keeps_the_momentum_itself(optimizer: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"use optimizer sgd with momentum 0, and set correction\.momentum"):
        spec(correction=correction("dana"), optimizer=optimizer)
    assert spec(correction=correction("dana"), optimizer={"lr": 0.1, "weight_decay": 0.1})


def test_all_faults_are_told_at_once() -> None:
    optimizer = {"lr": 0.1, "momentum": 0.9}
    with pytest.raises(ValidationError, match=r"k is 5.*; correction dana does nothing.*; correction dana keeps"):
        spec(consistency=mode("k_sync", k=5), correction=correction("dana"), optimizer=optimizer)


# Modes, servers and batches computed ahead

CHOOSING = {"k_sync", "backup", "rennala", "malenia", "ringleader"}
WAITING = {"bsp", "ssp"}


@pytest.mark.parametrize("name", sorted(MODES))
def test_modes_that_choose_gradients_need_one_server(name: str) -> None:
    scaling = {"workers": 4, "servers": 2}
    if name not in CHOOSING:
        assert spec(consistency=mode(name), scaling=scaling)
        return
    reason = f"scaling.servers is 2, but mode {name} chooses .* each server would choose differently: set .* to 1"
    with pytest.raises(ValidationError, match=reason):
        spec(consistency=mode(name), scaling=scaling)


@pytest.mark.parametrize("name", sorted(MODES))
def test_modes_that_choose_or_wait_compute_nothing_ahead(name: str) -> None:
    scaling = {"workers": 4, "pipeline": 1}
    if name not in CHOOSING | WAITING:
        assert spec(consistency=mode(name), scaling=scaling)
        return
    reason = "chooses which" if name in CHOOSING else "makes workers wait"
    with pytest.raises(ValidationError, match=f"scaling.pipeline is 1, but mode {name} {reason}.* to 0, or use mode"):
        spec(consistency=mode(name), scaling=scaling)


def test_synchronous_local_steps_compute_nothing_ahead_either() -> None:
    with pytest.raises(ValidationError, match="mode local makes workers wait for each other"):
        spec(consistency=mode("local", synchronous=True), scaling={"pipeline": 2})


@pytest.mark.parametrize("correcting", sorted(CORRECTIONS))
def test_every_correction_goes_with_several_servers(correcting: str) -> None:
    assert spec(correction=correction(correcting), scaling={"servers": 3, "pipeline": 2})


# Options of the workers


def test_a_plain_jobs_workers_push_gradients_and_nothing_else() -> None:
    assert spec().worker_options == WorkerOptions(
        local=None, compression=NoCompression(), sends_weights=False, stop_at=None
    )


def test_workers_of_local_steps_are_told_how_many_and_how_far() -> None:
    assert spec(consistency=mode("local", h=7, lr=0.25)).worker_options == WorkerOptions(
        local=LocalSteps(steps=7, lr=0.25)
    )


@pytest.mark.parametrize(
    ("compression", "told"),
    [
        ({"name": "int8"}, Int8Compression(name="int8")),
        ({"name": "top_k", "ratio": 0.5}, TopKCompression(name="top_k", ratio=0.5)),
    ],
)
def test_workers_are_told_how_to_compress(compression: dict[str, Any], told: Any) -> None:
    assert spec(compression=compression).worker_options.compression == told


@pytest.mark.parametrize("name", sorted(CORRECTIONS))
def test_weights_are_sent_along_only_where_a_correction_reads_them(name: str) -> None:
    assert spec(correction=correction(name)).worker_options.sends_weights == (name in ("dc_asgd", "gap_aware"))


def test_ringmaster_stops_computations_only_if_asked_to() -> None:
    assert spec(consistency=mode("ringmaster", r=3)).worker_options.stop_at is None
    assert spec(consistency=mode("ringmaster", r=3, stop=True)).worker_options.stop_at == 3


# Warnings


def test_ringmaster_on_unshuffled_shards_is_warned_of() -> None:
    data = MINIMAL["data"] | {"shuffle": False, "num_shards": 4}
    (warning,) = spec(consistency=mode("ringmaster"), data=data).warnings()
    assert "the weights fit the shards of fast workers better" in warning
    assert "Set data.shuffle or data.num_shards 1, or use mode ringleader" in warning
    for other in (data | {"shuffle": True}, data | {"num_shards": 1}):
        assert spec(consistency=mode("ringmaster"), data=other).warnings() == []


@pytest.mark.parametrize("name", sorted(set(MODES) - {"ringmaster"}))
def test_no_other_mode_is(name: str) -> None:
    assert spec(consistency=mode(name), data=MINIMAL["data"] | {"shuffle": False}).warnings() == []


@pytest.mark.parametrize(
    ("name", "fields", "stop_at"),
    [("ringmaster", {"r": 4}, 4), ("k_sync", {"k": 2}, 1), ("backup", {"b": 1}, 1), ("rennala", {"s": 2}, 1)],
)
def test_stopping_is_at_the_staleness_that_would_be_refused(name: str, fields: dict[str, Any], stop_at: int) -> None:
    assert spec(consistency={"mode": name, **fields, "stop": True}).worker_options.stop_at == stop_at
    assert spec(consistency={"mode": name, **fields}).worker_options.stop_at is None
