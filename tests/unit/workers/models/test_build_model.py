from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest

import psgd_workers
from psgd_workers import models
from psgd_workers.data.examples import Dataset, Examples
from psgd_workers.models import Model, build_model, evaluate
from psgd_workers.models.numpy.network import Network
from psgd_workers.spec import LinearModel, LossName, MlpModel, ModelSpec, PythonModel, TorchModel

FEATURES = np.random.default_rng(0).normal(size=(200, 2, 3)).astype(np.float32)
POSITIVE = FEATURES.sum(axis=(1, 2)) > 0


def images(loss: LossName) -> Dataset:
    """Return examples of class 1 if the sum of their features is positive, with labels for a loss."""
    if loss == "mse":
        return Dataset(Examples(FEATURES, POSITIVE.astype(np.float32)[:, np.newaxis]), None, None, fingerprint="")
    return Dataset(Examples(FEATURES, POSITIVE.astype(np.int64)), None, ("0", "1"), fingerprint="")


def shapes(model: Model) -> list[tuple[int, ...]]:
    return [tensor.shape for tensor in model.initial_weights(0).values()]


@pytest.mark.parametrize(("loss", "outputs"), [("cross_entropy", 2), ("binary_cross_entropy", 1), ("mse", 1)])
def test_sizes_are_taken_from_the_data(loss: LossName, outputs: int) -> None:
    linear = LinearModel(kind="linear", loss=loss)
    mlp = MlpModel(kind="mlp", hidden=(5, 4), loss=loss)
    data = images(loss)
    assert shapes(build_model(linear, data)) == [(outputs, 6), (outputs,)]
    assert shapes(build_model(mlp, data)) == [(5, 6), (5,), (4, 5), (4,), (outputs, 4), (outputs,)]


@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy", "mse"])
def test_a_dataset_can_be_learnt_by_every_loss(loss: LossName) -> None:
    spec = MlpModel(kind="mlp", hidden=(8,), activation="gelu", loss=loss)
    data = images(loss)
    model = build_model(spec, data)
    weights = dict(model.initial_weights(0))
    gradient = {name: np.empty_like(tensor) for name, tensor in weights.items()}
    before = evaluate(model, weights, data.train)
    for _ in range(200):
        model.loss_and_gradient(weights, data.train.inputs(slice(None)), data.train.labels, gradient, seed=0)
        for name, tensor in weights.items():
            tensor -= np.float32(0.3) * gradient[name]
    after = evaluate(model, weights, data.train)
    assert after.loss < before.loss / 3
    assert after.accuracy is None if loss == "mse" else (after.accuracy or 0) > 0.95


def test_the_users_own_models_are_built(users_module: ModuleType) -> None:
    users_module.make = lambda: Network((6, 2), "cross_entropy")  # type: ignore[attr-defined]
    specs: list[ModelSpec] = [
        PythonModel(kind="python", path="users_own.models:make"),
        TorchModel(kind="torch", path="torch.nn:Linear", kwargs={"in_features": 6, "out_features": 2}),
    ]
    for spec in specs:
        assert shapes(build_model(spec, images("cross_entropy"))) == [(2, 6), (2,)]


def test_torch_is_not_imported_until_a_job_needs_it() -> None:
    script = "import sys, psgd_workers.models; sys.exit('torch' in sys.modules)"
    root = next(iter(psgd_workers.__path__)).removesuffix("psgd_workers")
    subprocess.run([sys.executable, "-c", script], check=True, env={"PYTHONPATH": root})


def test_exported_names_are_pinned() -> None:
    assert models.__all__ == ["Model", "ModelWithBuffers", "build_model", "evaluate"]
