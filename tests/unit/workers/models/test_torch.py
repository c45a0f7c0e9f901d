from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from psgd_workers.errors import MissingExtraError, ModelError
from psgd_workers.gradients.layout import Layout
from psgd_workers.messages import FloatArray
from psgd_workers.models.numpy.network import Network
from psgd_workers.models.protocol import ModelWithBuffers
from psgd_workers.models.torch import TorchNetwork
from psgd_workers.spec import LossName, TorchModel

Adapted = Callable[..., TorchNetwork]


@pytest.fixture
def adapted(users_module: ModuleType) -> Adapted:
    """Return a function that adapts the module that a factory returns."""

    def make(factory: Callable[[], object], loss: LossName = "cross_entropy", device: Any = "cpu") -> TorchNetwork:
        users_module.make = factory  # type: ignore[attr-defined]
        return TorchNetwork(TorchModel(kind="torch", path="users_own.models:make", loss=loss, device=device), (6,))

    return make


def batch(rows: int = 8, seed: int = 0) -> tuple[FloatArray, NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, 6)).astype(np.float32), rng.integers(0, 3, rows)


def gradient_of(
    model: TorchNetwork, weights: dict[str, FloatArray], features: FloatArray, labels: NDArray[Any], seed: int = 0
) -> tuple[float, dict[str, FloatArray]]:
    """Return the loss and the gradient. The gradient is NaN before, so that a value that is not written is found."""
    layout = Layout.of(weights, model.buffers)
    flat = np.full(layout.num_parameters, np.nan, np.float32)
    loss = model.loss_and_gradient(layout.views(layout.pack(weights)), features, labels, layout.views(flat), seed)
    assert np.isfinite(flat).all()
    return loss, layout.views(flat)


class Mlp(nn.Module):
    """A module whose tensors have the same names as those of `Network`."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(fan_in, fan_out) for fan_in, fan_out in pairwise(sizes))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            values = layer(values).relu()
        outputs: torch.Tensor = self.layers[-1](values)
        return outputs


LABELS: dict[LossName, NDArray[Any]] = {
    "cross_entropy": batch()[1],
    "mse": np.random.default_rng(1).normal(size=(8, 2)).astype(np.float32),
    "binary_cross_entropy": batch()[1] % 2,
}


@pytest.mark.parametrize(
    ("loss", "num_outputs"), [("cross_entropy", 3), ("mse", 2), ("mse", 1), ("binary_cross_entropy", 1)]
)
def test_equals_its_numpy_twin(adapted: Adapted, loss: LossName, num_outputs: int) -> None:
    model = adapted(lambda: Mlp(6, 5, num_outputs), loss)
    network = Network((6, 5, num_outputs), loss)
    weights = network.initial_weights(0)
    features = batch()[0]
    labels = LABELS[loss][:, :num_outputs] if loss == "mse" else LABELS[loss]
    value, gradient = gradient_of(model, weights, features, labels)
    expected = {name: np.empty_like(tensor) for name, tensor in weights.items()}
    assert value == pytest.approx(network.loss_and_gradient(weights, features, labels, expected, 0), rel=1e-5)
    assert set(gradient) == set(weights)
    for name, tensor in expected.items():
        np.testing.assert_allclose(gradient[name], tensor, rtol=1e-5, atol=1e-7)

    outputs = model.predict(weights, features)
    np.testing.assert_allclose(outputs, network.predict(weights, features), rtol=1e-5, atol=1e-6)
    assert model.loss(outputs, labels) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("loss", ["binary_cross_entropy", "mse"])
def test_a_module_that_drops_the_last_axis_has_one_output(adapted: Adapted, loss: LossName) -> None:
    wide = adapted(lambda: nn.Linear(6, 1), loss)
    weights = wide.initial_weights(0)
    features = batch()[0]
    labels = LABELS[loss][:, :1] if loss == "mse" else LABELS[loss]
    expected = gradient_of(wide, weights, features, labels)
    outputs = wide.predict(weights, features)

    class Narrow(nn.Linear):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return super().forward(values).squeeze(1)

    narrow = adapted(lambda: Narrow(6, 1), loss)
    value, gradient = gradient_of(narrow, weights, features, labels)
    assert value == expected[0]
    for name, tensor in gradient.items():
        np.testing.assert_array_equal(tensor, expected[1][name])
    np.testing.assert_array_equal(narrow.predict(weights, features), outputs)


def test_outputs_that_would_broadcast_against_the_labels_are_refused(adapted: Adapted) -> None:
    model = adapted(lambda: nn.Linear(6, 3), "mse")
    with pytest.raises(ModelError, match=r"outputs have shape \[8, 3\]; expected \[8, 1\]"):
        gradient_of(model, model.initial_weights(0), batch()[0], LABELS["mse"][:, :1])


def test_initial_weights_are_a_function_of_the_seed(adapted: Adapted) -> None:
    model = adapted(lambda: Mlp(6, 5, 3))
    first, again, other = (model.initial_weights(seed) for seed in (3, 3, 4))
    torch.manual_seed(3)
    for name, parameter in Mlp(6, 5, 3).named_parameters():
        np.testing.assert_array_equal(first[name], parameter.detach())
        np.testing.assert_array_equal(again[name], first[name])
        assert not np.array_equal(other[name], first[name])


def test_initial_weights_do_not_change_when_the_model_trains(adapted: Adapted) -> None:
    model = adapted(lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)))
    weights = model.initial_weights(0)
    kept = {name: tensor.copy() for name, tensor in weights.items()}
    gradient_of(model, {name: tensor + 1 for name, tensor in weights.items()}, *batch())
    for name, tensor in weights.items():
        np.testing.assert_array_equal(tensor, kept[name])


def test_dropout_is_a_function_of_the_batchs_seed(adapted: Adapted) -> None:
    model = adapted(lambda: nn.Sequential(nn.Linear(6, 32), nn.Dropout(0.5), nn.Linear(32, 3)))
    weights = model.initial_weights(0)
    losses = [gradient_of(model, weights, *batch(), seed=seed)[0] for seed in (1, 2, 1)]
    assert losses[0] == losses[2] != losses[1]
    np.testing.assert_array_equal(model.predict(weights, batch()[0]), model.predict(weights, batch()[0]))


def test_one_step_of_rate_one_gives_buffers_the_values_torch_gives_them(adapted: Adapted) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))

    model = adapted(make)
    weights = model.initial_weights(7)
    assert isinstance(model, ModelWithBuffers)
    assert set(model.buffers) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    torch.manual_seed(7)
    module = make()
    for step in range(3):
        features, labels = batch(seed=step)
        module(torch.from_numpy(features))
        _, gradient = gradient_of(model, weights, features, labels)
        for name in model.buffers:
            weights[name] = weights[name] - gradient[name]
            np.testing.assert_allclose(weights[name], module.state_dict()[name], rtol=1e-5, atol=1e-7)
    assert weights["1.num_batches_tracked"] == 3


def test_integer_buffers_are_rounded_when_they_come_back(adapted: Adapted) -> None:
    model = adapted(lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)))
    weights = model.initial_weights(0) | {"1.num_batches_tracked": np.array(40.9999, np.float32)}
    _, gradient = gradient_of(model, weights, *batch())
    assert weights["1.num_batches_tracked"] - gradient["1.num_batches_tracked"] == 42


def test_prediction_uses_the_buffers_it_is_given_and_leaves_them(adapted: Adapted) -> None:
    model = adapted(lambda: nn.BatchNorm1d(6, affine=True, eps=0))
    weights = model.initial_weights(0) | {"running_mean": np.full(6, 2, np.float32)}
    features = batch()[0]
    for _ in range(2):
        np.testing.assert_allclose(model.predict(weights, features), features - 2, rtol=1e-6)


class Counting(nn.Linear):
    """A module that replaces the tensor of one buffer, and has another buffer outside its `state_dict`."""

    seen: torch.Tensor
    noise: torch.Tensor

    def __init__(self) -> None:
        super().__init__(6, 3)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("noise", torch.rand(3), persistent=False)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        self.seen = self.seen + len(values)
        return super().forward(values) + self.noise


def test_a_buffer_may_be_replaced_by_the_module(adapted: Adapted) -> None:
    model = adapted(Counting)
    weights = model.initial_weights(0)
    for _ in range(2):
        assert gradient_of(model, weights, *batch())[1]["seen"] == -8


def test_a_buffer_outside_the_state_is_not_among_the_weights_and_is_the_same_on_every_worker(adapted: Adapted) -> None:
    models = [adapted(Counting), adapted(Counting)]
    assert set(models[0].initial_weights(0)) == {"weight", "bias", "seen"}
    weights = models[0].initial_weights(0)
    first, second = (model.predict(weights, batch()[0]) for model in models)
    np.testing.assert_array_equal(first, second)


def test_a_tied_parameter_is_one_tensor(adapted: Adapted) -> None:
    def make() -> nn.Module:
        module = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
        module[1].weight = module[0].weight
        return module

    model = adapted(make, "mse")
    weights = model.initial_weights(0)
    assert list(weights) == ["0.weight"]
    assert not model.buffers
    twice = weights["0.weight"] @ weights["0.weight"]
    features = batch()[0]
    np.testing.assert_allclose(model.predict(weights, features), features @ twice.T, rtol=1e-4, atol=1e-5)


def test_a_frozen_parameter_is_a_buffer_that_never_moves(adapted: Adapted) -> None:
    model = adapted(lambda: nn.Sequential(nn.Linear(6, 5).requires_grad_(False), nn.Linear(5, 3)))
    assert set(model.buffers) == {"0.weight", "0.bias"}
    gradient = gradient_of(model, model.initial_weights(0), *batch())[1]
    assert not gradient["0.weight"].any()
    assert gradient["1.weight"].any()


def test_a_parameter_that_took_no_part_has_gradient_zero(adapted: Adapted) -> None:
    class Idle(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 3)
            self.idle = nn.Parameter(torch.ones(2))

    model = adapted(Idle)
    for _ in range(2):
        np.testing.assert_array_equal(gradient_of(model, model.initial_weights(0), *batch())[1]["idle"], [0, 0])


def test_read_only_arrays_are_taken_without_a_warning(adapted: Adapted) -> None:
    model = adapted(lambda: nn.Linear(6, 3))
    weights = {name: tensor.copy() for name, tensor in model.initial_weights(0).items()}
    features, labels = batch()
    arrays: list[NDArray[Any]] = [*weights.values(), features, labels]
    for array in arrays:
        array.flags.writeable = False
    gradient = {name: np.empty_like(tensor) for name, tensor in weights.items()}
    loss = model.loss_and_gradient(weights, features, labels, gradient, seed=0)
    assert model.loss(model.predict(weights, features), labels) == pytest.approx(loss, rel=1e-6)


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(3))


def test_lazy_modules_get_their_sizes_from_the_data(adapted: Adapted) -> None:
    model = adapted(lazy)
    first, again, other = (model.initial_weights(seed) for seed in (3, 3, 4))
    assert first["0.weight"].shape == (5, 6)
    assert first["3.weight"].shape == (3, 5)
    for name, tensor in first.items():
        np.testing.assert_array_equal(tensor, again[name])
    assert not np.array_equal(first["0.weight"], other["0.weight"])
    np.testing.assert_array_equal(first["1.running_mean"], np.zeros(5))  # unchanged by the forward pass over zeros
    loss, gradient = gradient_of(model, first, *batch())
    assert np.isfinite(loss)
    assert gradient["0.weight"].any()


def test_a_lazy_module_that_is_not_used_is_named(adapted: Adapted) -> None:
    class Unused(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 3)
            self.other = nn.LazyLinear(3)

    with pytest.raises(ModelError, match=r"without values: other\.weight, other\.bias; a forward pass over zeros gave"):
        adapted(Unused)


def test_a_lazy_module_that_does_not_fit_the_data_is_refused_with_the_reason(adapted: Adapted) -> None:
    with pytest.raises(ModelError, match=r"0\.weight, .* pass over zeros of shape \[2, 6\] raised RuntimeError"):
        adapted(lambda: nn.Sequential(nn.LazyConv2d(3, 3)))


def test_parameters_without_memory_are_refused(adapted: Adapted) -> None:
    with pytest.raises(ModelError, match=r"has parameters without values: weight, bias; .* layers on the CPU"):
        adapted(lambda: nn.Linear(6, 3, device="meta"))


def test_a_module_may_return_one_number_for_each_example(adapted: Adapted) -> None:
    class Squeezed(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 1)

        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return super().forward(values).squeeze()

    model = adapted(Squeezed, "mse")
    for rows in (1, 2):
        assert model.predict(model.initial_weights(0), batch(rows)[0]).shape == (rows, 1)


def test_a_factory_must_make_a_module(adapted: Adapted) -> None:
    with pytest.raises(ModelError, match=r"'users_own\.models:make' returned a dict; expected a torch\.nn\.Module"):
        adapted(dict)


def test_cuda_that_is_not_there_is_refused(adapted: Adapted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="asks for device 'cuda', but this worker has no GPU"):
        adapted(lambda: nn.Linear(6, 3), device="cuda")
    adapted(lambda: nn.Linear(6, 3), device="auto")


def test_without_torch_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "psgd_workers.models.torch")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'psgd\[torch\]'"):
        importlib.import_module("psgd_workers.models.torch")
