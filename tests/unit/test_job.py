from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from psgd.errors import ModelError, SpecError
from psgd.job import OpenJob, build_worker
from psgd.spec import JobSpec
from psgd_workers.messages import BatchId

ARRAYS: dict[str, Any] = {
    "x_train": np.random.default_rng(0).normal(size=(33, 6)).astype(np.float32),
    "y_train": np.arange(33) % 3,
    "x_test": np.random.default_rng(1).normal(size=(5, 6)).astype(np.float32),
    "y_test": np.arange(5) % 3,
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    np.savez(tmp_path / "data.npz", **ARRAYS)
    return tmp_path / "data.npz"


@pytest.fixture
def users_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return a module of the user, which can be imported as `users_own`."""
    module = ModuleType("users_own")
    monkeypatch.setitem(sys.modules, "users_own", module)
    return module


def spec(path: Path, *, data: dict[str, Any] | None = None, **sections: Any) -> JobSpec:
    plain = {
        "model": {"kind": "linear"},
        "data": {"format": "npz", "path": str(path), "batch_size": 16} | (data or {}),
        "optimizer": {"lr": 0.1},
        "run": {"epochs": 1},
    }
    return JobSpec.model_validate(plain | sections)


TORCH = {"kind": "torch", "path": "users_own:make"}


class InPlace(nn.Sequential):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = super().forward(values.div_(255))  # type: ignore[no-untyped-call]
        return outputs


def test_a_model_that_changes_its_inputs_in_place_is_validated_on_what_the_file_holds(
    path: Path, users_module: ModuleType
) -> None:
    users_module.make = lambda: InPlace(nn.Linear(6, 3))  # type: ignore[attr-defined]
    job = OpenJob.open(spec(path, model=TORCH))
    assert job.dataset.validation is not None
    np.testing.assert_array_equal(job.dataset.validation.features, ARRAYS["x_test"])
    np.testing.assert_array_equal(job.dataset.train.features, ARRAYS["x_train"])
    worker = build_worker(job.spec, "worker-0", job.dataset, job.layout)
    assert worker.evaluate(job.weights, job.dataset.validation) == worker.evaluate(job.weights, job.dataset.validation)
    np.testing.assert_array_equal(job.dataset.validation.features, ARRAYS["x_test"])


def test_too_few_outputs_are_found_though_the_first_batch_has_no_such_label(
    path: Path, users_module: ModuleType
) -> None:
    np.savez(path, **ARRAYS | {"y_train": np.repeat([0, 1, 2], 11)})
    users_module.make = lambda: nn.Linear(6, 2)  # type: ignore[attr-defined]
    message = "the model's outputs do not fit the labels: for 8 examples their shape is [8, 2], expected [8, 3]"
    with pytest.raises(ModelError, match=re.escape(message)):
        OpenJob.open(spec(path, model=TORCH, data={"batch_size": 8, "shuffle": False}))


def test_a_last_batch_of_one_example_can_be_left_out(path: Path, users_module: ModuleType) -> None:
    users_module.make = lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match=r"the smallest batch \(1 example, .*Leave it out by `data\.drop_last: true`"):
        OpenJob.open(spec(path, model=TORCH))
    job = OpenJob.open(spec(path, model=TORCH, data={"drop_last": True}))
    assert (job.shards.grid.num_batches, job.shards.grid.num_examples) == (2, 32)
    assert job.warnings() == [
        "data.drop_last omits 1 of 33 training examples from each epoch: different ones each time"
    ]


def test_local_steps_are_tried_on_their_smallest_mini_batch(path: Path, users_module: ModuleType) -> None:
    users_module.make = lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))  # type: ignore[attr-defined]
    local = {"mode": "local", "h": 2, "lr": 0.1}
    with pytest.raises(ModelError, match=r"the smallest batch \(1 example"):
        OpenJob.open(spec(path, model=TORCH, consistency=local, data={"batch_size": 8}))
    job = OpenJob.open(spec(path, model=TORCH, consistency=local, data={"batch_size": 8, "drop_last": True}))
    assert [len(rows) for rows in job.shards.mini_batches(BatchId(0, 0, 1))] == [8, 8]
    assert job.shards.grid.num_batches == 2


@pytest.mark.parametrize(
    ("data", "warnings"),
    [
        ({}, []),
        ({"batch_size": 11, "drop_last": True}, []),
        (
            {"drop_last": True, "shuffle": False},
            [
                "data.drop_last omits 1 of 33 training examples from each epoch: the same ones, because "
                "data.shuffle is false"
            ],
        ),
    ],
)
def test_examples_are_left_out_with_a_word_or_not_at_all(path: Path, data: dict[str, Any], warnings: list[str]) -> None:
    assert OpenJob.open(spec(path, data=data)).warnings() == warnings


def test_whole_numbers_are_targets_of_mse(path: Path) -> None:
    np.savez(path, **ARRAYS | {"y_train": np.arange(33) - 2**20, "y_test": np.arange(5) + 2**21})
    job = OpenJob.open(spec(path, model={"kind": "linear", "loss": "mse"}))
    assert job.dataset.train.labels.shape == (33, 1)
    assert job.layout.shapes == ((1, 6), (1,))


def test_a_target_that_is_never_measured_is_refused(path: Path) -> None:
    target = {"epochs": 1, "target": {"metric": "val/accuracy", "value": 0.9}}
    np.savez(path, x_train=ARRAYS["x_train"], y_train=ARRAYS["y_train"])
    with pytest.raises(SpecError, match=r"the data has no validation part: set data\.validation_fraction"):
        OpenJob.open(spec(path, run=target))
    mse = {"kind": "linear", "loss": "mse"}
    with pytest.raises(SpecError, match="the labels are numbers, not classes: use val/loss"):
        OpenJob.open(spec(path, run=target, model=mse, data={"validation_fraction": 0.2}))


def tried(model: str, local: bool = False) -> OpenJob:
    tree = {
        "model": {"kind": "python", "path": f"tests.support.wrong_gradients:{model}"},
        "data": {"format": "sklearn", "dataset": "digits"},
        "optimizer": {"lr": 0.1},
        "consistency": {"mode": "local", "h": 2, "lr": 0.1} if local else {"mode": "async"},
        "run": {"epochs": 1},
    }
    return OpenJob.open(JobSpec.model_validate(tree))


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("model", ["SkipsBias", "Accumulates"])
def test_a_model_whose_gradient_depends_on_what_was_in_its_memory_is_refused(model: str, local: bool) -> None:
    with pytest.raises(ModelError, match=r"loss_and_gradient wrote 0 of the \d+ values of gradient 'layers\.0\."):
        tried(model, local)


@pytest.mark.parametrize("model", ["ScaledRow", "ZeroGradient", "NanGradient"])
def test_a_gradient_that_is_wrong_zero_or_not_finite_was_written(model: str) -> None:
    assert tried(model).layout.num_parameters == 650
