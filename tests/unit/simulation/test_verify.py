from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from psgd.cli import main
from psgd.errors import ModelError, SpecError
from psgd.simulation.verify import Check, verify
from psgd.spec import JobSpec

PROMISES = [
    "gradient",
    "a batch computed again",
    "1 asynchronous worker",
    "bsp of 4 workers",
    "bsp of 4 workers",
    "3 partitions",
    "kill and resume",
    "killed workers",
]


def tree(**sections: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "model": {"kind": "mlp", "hidden": [12]},
        "data": {"format": "sklearn", "dataset": "digits", "normalize": "unit"},
        "optimizer": {"lr": 0.1},
        "run": {"epochs": 3},
    }
    return plain | sections


def checks(limit_s: float = 1.0, **sections: Any) -> list[Check]:
    return verify(JobSpec.model_validate(tree(**sections)), limit_s)


def broken(found: list[Check]) -> set[str]:
    return {check.name for check in found if not check.holds}


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"optimizer": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}},
        {"optimizer": {"name": "adamw", "lr": 1e-3, "schedule": {"name": "cosine", "epochs": 1, "warmup": 0.2}}},
        {"optimizer": {"lr": 0.1, "max_grad_norm": 0.5, "clip_value": 0.01}, "consistency": {"mode": "ssp", "s": 1}},
        {"consistency": {"mode": "local", "h": 3, "lr": 0.1}, "compression": {"name": "int8"}},
        {"model": {"kind": "linear"}, "data": {"format": "sklearn", "dataset": "iris", "batch_size": 40}},
        {"model": {"kind": "torch", "path": "tests.support.torch_modules:mlp", "kwargs": {"hidden": 8}}},
        {"scaling": {"servers": 2, "pipeline": 1}},
    ],
    ids=["sgd", "nesterov", "adamw", "clipped ssp", "local", "short last batch", "torch", "2 servers, pipelined"],
)
def test_every_promise_is_kept_whatever_the_job_asks_for(sections: dict[str, Any]) -> None:
    found = checks(**sections)
    assert [check.name for check in found] == PROMISES
    assert broken(found) == set(), found


def test_a_wrong_gradient_is_found_and_its_tensor_named() -> None:
    found = checks(model={"kind": "python", "path": "tests.support.wrong_gradients:ScaledRow"})
    assert broken(found) == {"gradient"}
    assert "layers.0.weight" in found[0].observed


def test_a_model_that_remembers_is_found() -> None:
    found = checks(model={"kind": "python", "path": "tests.support.wrong_gradients:Nondeterministic"})
    assert broken(found) >= {"a batch computed again", "1 asynchronous worker", "3 partitions", "kill and resume"}
    assert "killed workers" not in broken(found)


def test_a_job_may_be_a_mapping_and_is_checked_like_a_job_file() -> None:
    with pytest.raises(SpecError, match=r"run\.epoch: unknown field; did you mean 'epochs'"):
        verify(tree(run={"epoch": 1}))


@pytest.mark.parametrize("lr", [1e30, 1e38])
def test_a_job_that_diverges_is_told_so_by_every_promise_that_trains(lr: float) -> None:
    found = checks(limit_s=600.0, optimizer={"lr": lr})  # time for many rounds on any machine
    assert [check.name for check in found] == PROMISES
    assert broken(found) == set(PROMISES[2:])
    assert all("Lower optimizer.lr" in check.observed for check in found[2:])


def test_a_gradient_that_is_not_finite_at_once_keeps_no_promise() -> None:
    found = checks(model={"kind": "python", "path": "tests.support.wrong_gradients:NanGradient"})
    assert found[0].observed == "the gradient of the first batch is not finite"
    assert broken(found) == set(PROMISES)


def test_a_gradient_of_nothing_but_zeros_keeps_no_promise_about_the_gradient() -> None:
    found = checks(model={"kind": "python", "path": "tests.support.wrong_gradients:ZeroGradient"})
    assert found[0].observed == "the gradient is zero in every tensor: training changes nothing"
    assert "gradient" in broken(found)


@pytest.mark.parametrize("model", ["SkipsBias", "Accumulates"])
def test_a_model_that_does_not_overwrite_its_gradient_is_refused(model: str) -> None:
    with pytest.raises(ModelError, match=r"loss_and_gradient wrote 0 of the \d+ values of gradient 'layers\.0\."):
        checks(model={"kind": "python", "path": f"tests.support.wrong_gradients:{model}"})


@pytest.mark.parametrize(("model", "code"), [("linear", 0), ("wrong", 3)])
def test_the_command_tells_and_its_exit_code_says_whether_all_hold(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model: str,
    code: int,
) -> None:
    wrong = {"kind": "python", "path": "tests.support.wrong_gradients:ScaledRow"}
    job = tree(model={"kind": "linear"} if model == "linear" else wrong)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    monkeypatch.setattr(sys, "argv", ["psgd", "verify", str(tmp_path / "job.yaml"), "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert ended.value.code == code
    found = json.loads(out)["checks"]
    assert [check["holds"] for check in found] == [model == "linear", *[True] * 7]
    assert ("does not hold" in err) == (code == 3)
