from __future__ import annotations

from typing import Any

import pytest

from psgd.errors import SpecError
from psgd.spec import JobSpec, SimulateConfig, SimulationTarget
from psgd.spec.reader import parse_spec

JOB: dict[str, Any] = {
    "model": {"kind": "linear"},
    "data": {"format": "sklearn", "dataset": "iris"},
    "optimizer": {"lr": 0.1},
    "run": {"epochs": 1},
}


def section(**fields: Any) -> SimulateConfig:
    spec = parse_spec(JOB | {"simulate": fields}, "it")
    assert spec.simulate is not None
    return spec.simulate


def said(**fields: Any) -> str:
    with pytest.raises(SpecError) as refused:
        section(**fields)
    return " | ".join(line.strip() for line in str(refused.value).splitlines()[1:])


@pytest.mark.parametrize(
    ("short", "fields"),
    [
        ("constant:1", {"name": "constant", "seconds": 1}),
        ("exponential:.5", {"name": "exponential", "mean": 0.5}),
        ("lognormal:-4.6, 1e-1", {"name": "lognormal", "mu": -4.6, "sigma": 0.1}),
        (" gamma:100,0.01 ", {"name": "gamma", "shape": 100, "scale": 0.01}),
        ("linear:1,0", {"name": "linear", "slope": 1, "spread": 0}),
        ("measured:s3://runs/a,b:1", {"name": "measured", "path": "s3://runs/a,b:1"}),
        ("slow:20", {"name": "slow", "factor": 20}),
        ("slow:20,gamma,9,1", {"name": "slow", "factor": 20, "base": {"name": "gamma", "shape": 9, "scale": 1}}),
        ("slow:2,measured,runs/a", {"name": "slow", "factor": 2, "base": {"name": "measured", "path": "runs/a"}}),
    ],
)
def test_delays_in_short_form_are_the_same_as_their_fields(short: str, fields: dict[str, Any]) -> None:
    assert section(delays=short) == section(delays=fields)


NAMES = "constant, exponential, lognormal, gamma, linear, slow, measured"
BASES = NAMES.replace("slow, ", "")
S_HAVING = "s is a field of consistency malenia, rennala, softsync and ssp"


@pytest.mark.parametrize(
    ("short", "answer"),
    [
        ("", f"simulate.delays.name: expected one of {NAMES}, not ''"),
        (
            "expnential:1",
            f"simulate.delays.name: expected one of {NAMES}, not 'expnential'; did you mean 'exponential'?",
        ),
        (
            "slow:20,gama,1,1",
            f"simulate.delays.base.name: expected one of {BASES}, not 'gama'; did you mean 'gamma'?",
        ),
        ("slow:exponential", "simulate.delays.factor: expected a number, not 'exponential'"),
        ("constant", "simulate.delays.seconds: missing (Time of each gradient, in virtual seconds.)"),
        ("constant:1,2", "simulate.delays: expected constant:SECONDS, not 'constant:1,2'"),
        ("gamma:100", "simulate.delays.scale: missing (Scale of the distribution, in virtual seconds.)"),
        ("gamma:100,", "simulate.delays.scale: expected a number, not ''"),
        ("linear:one,1", "simulate.delays.slope: expected a number, not 'one'"),
        ("constant:0", "simulate.delays.seconds: expected at least 1e-12, not 0.0"),
        ("exponential:nan", "simulate.delays.mean: expected a finite number, not nan"),
        ("lognormal:1000,1", "simulate.delays.mu: expected at most 20, not 1000.0"),
        ("lognormal:0,0", "simulate.delays.sigma: expected at least 1e-12, not 0.0"),
        ("gamma:inf,1", "simulate.delays.shape: expected a finite number, not inf"),
        ("linear:1,-1", "simulate.delays.spread: expected at least 0, not -1.0"),
        ("slow:0", "simulate.delays.factor: expected at least 1e-12, not 0.0"),
        ("measured:", "simulate.delays.path: expected text that is not empty, not ''"),
    ],
)
def test_other_delays_are_refused_with_what_to_write(short: str, answer: str) -> None:
    assert said(delays=short) == answer


def test_fields_of_delays_get_did_you_mean() -> None:
    assert said(delays={"name": "gamma", "shap": 1, "scale": 1}).endswith(
        "simulate.delays.shap: unknown field; did you mean 'shape'?"
    )
    assert said(delays=3).startswith("simulate.delays: expected fields, not 3")


def test_modes_in_short_form_are_the_same_as_their_fields() -> None:
    short = section(modes="async, ringmaster:r=32:lr=0.05:correction=staleness_lr,local:h=2:lr=0.1").modes
    assert short is not None
    ringmaster = {"consistency": {"mode": "ringmaster", "r": 32}, "lr": 0.05, "correction": {"name": "staleness_lr"}}
    local = {"consistency": {"mode": "local", "h": 2, "lr": 0.1}}
    full = section(modes=[{"consistency": {"mode": "async"}}, ringmaster, local]).modes
    assert full is not None
    assert [mode.model_copy(update={"name": None}) for mode in short] == list(full)
    assert [mode.label for mode in short] == [
        "async",
        "ringmaster:r=32:lr=0.05:correction=staleness_lr",
        "local:h=2:lr=0.1",
    ]
    assert [mode.label for mode in full] == ["async", "ringmaster:r=32", "local:h=2:lr=0.1"]
    assert section(modes=["bsp", {"name": "mine", "consistency": {"mode": "bsp"}}]).modes


def test_the_jobs_own_mode_keeps_the_jobs_fields() -> None:
    own = {"consistency": {"mode": "ringmaster", "r": 5, "late": "discard"}}
    given = {"modes": ["ringmaster", "ringmaster:r=9", "async"]}
    spec = parse_spec(JOB | own | {"simulate": given}, "it")
    assert spec.simulate is not None
    assert [mode.consistency.model_dump() for mode in spec.simulate.modes or ()] == [
        {"mode": "ringmaster", "r": 5, "late": "discard", "stop": False},
        {"mode": "ringmaster", "r": 9, "late": "discard", "stop": False},
        {"mode": "async"},
    ]
    assert given == {"modes": ["ringmaster", "ringmaster:r=9", "async"]}
    assert parse_spec(spec.model_dump(mode="json"), "again") == spec


@pytest.mark.parametrize(
    ("modes", "answer"),
    [
        ("async,,bsp", "simulate: expected modes, such as async,ringmaster:r=32,bsp; one of them is empty"),
        ("k_sync:k=0", "simulate.modes.0.consistency.k: expected at least 1, not 0"),
        ("async,bsp:s=1", f"simulate.modes.1.consistency.s: unknown field; {S_HAVING}, not of bsp"),
        ([], "simulate.modes: expected a list of at least 1, not []"),
        ([3], "simulate.modes.0: expected fields, not 3; for example {NAME: VALUE}"),
        (3, "simulate.modes: expected a list, not 3"),
    ],
)  # fmt: skip
def test_other_modes_are_refused_with_what_to_write(modes: Any, answer: str) -> None:
    assert said(modes=modes) == answer


def test_a_target_in_short_form_is_the_same_as_its_fields() -> None:
    assert section(until="val/loss=1e-2").until == SimulationTarget(metric="val/loss", value=0.01)


@pytest.mark.parametrize("text", ["accuracy=1", "val/loss", "val/loss=low", "val/loss=true", "val/loss=nan", "=1"])
def test_a_target_that_is_none_is_refused(text: str) -> None:
    assert said(until=text).startswith("simulate.until")


def test_a_target_is_met_from_its_side() -> None:
    accuracy = SimulationTarget(metric="val/accuracy", value=0.9)
    assert (accuracy.reached(0.95), accuracy.reached(0.85)) == (True, False)
    assert SimulationTarget(metric="excess", value=1e-3).reached(5e-4)


def test_a_quadratic_has_another_metric_than_a_job() -> None:
    assert section(model="quadratic", until="excess=1").until
    assert "a quadratic has only excess" in said(model="quadratic", until="val/loss=1")
    assert "excess, which only a quadratic has" in said(until="excess=1")


@pytest.mark.parametrize(
    "fields",
    [
        {"workers": 0},
        {"link_s": -1.0},
        {"join_s": float("nan")},
        {"crash_s": 0.0},
        {"size": 1},
        {"pushes": 0},
        {"seed": -1},
    ],
)
def test_workers_that_cannot_be_are_refused(fields: dict[str, Any]) -> None:
    assert said(**fields).startswith(f"simulate.{next(iter(fields))}: expected")


def test_short_forms_are_in_the_schema() -> None:
    properties = JobSpec.model_json_schema()["$defs"]["SimulateConfig"]["properties"]
    for field in ("delays", "modes", "until"):
        assert '"type": "string"' in str(properties[field]).replace("'", '"'), field


def test_training_ignores_the_section() -> None:
    with_section = parse_spec(JOB | {"simulate": {"workers": 9}}, "it")
    assert with_section.identity_hash() == parse_spec(JOB, "it").identity_hash()
