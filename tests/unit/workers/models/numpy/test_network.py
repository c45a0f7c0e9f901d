from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from psgd_workers.gradients.layout import Layout
from psgd_workers.messages import FloatArray
from psgd_workers.models.numpy.layers import ActivationName
from psgd_workers.models.numpy.network import Network
from psgd_workers.spec import LossName

TORCH_ACTIVATIONS: dict[ActivationName, torch.nn.Module] = {
    "relu": torch.nn.ReLU(),
    "tanh": torch.nn.Tanh(),
    "gelu": torch.nn.GELU(approximate="tanh"),
}

each_activation = pytest.mark.parametrize("activation", TORCH_ACTIVATIONS)


def batch(rows: int, num_classes: int = 3, seed: int = 0) -> tuple[FloatArray, NDArray[np.int64]]:
    """Return examples of shape `[2, 3]` and their classes."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, 2, 3)).astype(np.float32), rng.integers(0, num_classes, rows)


def gradient_of(
    network: Network, weights: dict[str, Any], features: NDArray[Any], labels: NDArray[Any]
) -> tuple[float, dict[str, Any]]:
    """Return the loss and the gradient. The gradient is NaN before, so that a value that is not written is found."""
    gradient = {name: np.full_like(tensor, np.nan) for name, tensor in weights.items()}
    return network.loss_and_gradient(weights, features, labels, gradient, seed=0), gradient


def twin(weights: dict[str, NDArray[Any]], activation: ActivationName) -> torch.nn.Sequential:
    """Return the same network as a `torch.nn.Sequential` in float64."""
    modules: list[torch.nn.Module] = [torch.nn.Flatten()]
    for number in range(len(weights) // 2):
        weight, bias = (torch.from_numpy(weights[f"layers.{number}.{kind}"]) for kind in ("weight", "bias"))
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
        linear.load_state_dict({"weight": weight, "bias": bias})
        modules += [linear, TORCH_ACTIVATIONS[activation]]
    return torch.nn.Sequential(*modules[:-1])


@each_activation
@pytest.mark.parametrize("sizes", [(6, 3), (6, 5, 3), (6, 8, 4, 3)])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_equals_a_torch_sequential(sizes: tuple[int, ...], activation: ActivationName, loss: LossName) -> None:
    network = Network(sizes, loss, activation)
    rng = np.random.default_rng(1)
    weights: dict[str, Any] = {
        name: rng.normal(size=tensor.shape) for name, tensor in network.initial_weights(0).items()
    }
    features, classes = batch(7)
    labels = classes if loss == "cross_entropy" else rng.normal(size=(7, 3))
    module = twin(weights, activation)

    outputs = module(torch.from_numpy(features).double())
    objective = torch.nn.CrossEntropyLoss() if loss == "cross_entropy" else torch.nn.MSELoss()
    expected = objective(outputs, torch.from_numpy(labels))
    expected.backward()

    value, gradient = gradient_of(network, weights, features.astype(np.float64), labels)
    assert value == pytest.approx(expected.item(), rel=1e-9)
    np.testing.assert_allclose(network.predict(weights, features.astype(np.float64)), outputs.detach(), rtol=1e-9)
    for written, parameter in zip(gradient.values(), module.parameters(), strict=True):
        assert parameter.grad is not None
        np.testing.assert_allclose(written, parameter.grad, rtol=1e-6, atol=1e-12)


def test_tensors_are_named_by_layer_with_torchs_shapes() -> None:
    shapes = {name: tensor.shape for name, tensor in Network((6, 5, 3), "mse").initial_weights(0).items()}
    assert shapes == {
        "layers.0.weight": (5, 6),
        "layers.0.bias": (5,),
        "layers.1.weight": (3, 5),
        "layers.1.bias": (3,),
    }


def test_gradient_is_written_through_a_layouts_views() -> None:
    network = Network((6, 5, 3), "cross_entropy")
    weights = network.initial_weights(0)
    layout = Layout.of(weights)
    flat = np.full(layout.num_parameters, np.nan, np.float32)
    features, labels = batch(4)
    network.loss_and_gradient(layout.views(layout.pack(weights)), features, labels, layout.views(flat), seed=0)
    np.testing.assert_array_equal(flat, layout.pack(gradient_of(network, weights, features, labels)[1]))
    assert np.isfinite(flat).all()


@each_activation
def test_a_short_last_batch_is_computed_as_if_it_were_alone(activation: ActivationName) -> None:
    network = Network((6, 5, 3), "cross_entropy", activation)
    weights = network.initial_weights(0)
    long = batch(8)
    short = batch(3, seed=5)
    before = gradient_of(network, weights, *long)
    expected = gradient_of(Network((6, 5, 3), "cross_entropy", activation), weights, *short)
    for (loss, gradient), (other_loss, other) in [
        (gradient_of(network, weights, *short), expected),
        (gradient_of(network, weights, *long), before),
    ]:
        assert loss == other_loss
        for name, tensor in gradient.items():
            np.testing.assert_array_equal(tensor, other[name])


def test_a_step_leaves_weights_features_and_labels_alone() -> None:
    network = Network((6, 5, 3), "cross_entropy")
    weights = network.initial_weights(0)
    features, labels = batch(4)
    arrays: list[NDArray[Any]] = [*weights.values(), features, labels]
    for array in arrays:
        array.flags.writeable = False
    gradient_of(network, weights, features, labels)
    network.predict(weights, features)


def test_predictions_survive_the_next_call_and_the_loss() -> None:
    network = Network((6, 5, 3), "cross_entropy")
    weights = network.initial_weights(0)
    features, labels = batch(4)
    outputs = network.predict(weights, features)
    kept = outputs.copy()
    loss = network.loss(outputs, labels)
    network.predict(weights, batch(2000, seed=1)[0])
    np.testing.assert_array_equal(outputs, kept)
    assert loss == gradient_of(network, weights, features, labels)[0]


def test_a_diverged_model_gives_a_gradient_that_is_not_finite_instead_of_warnings() -> None:
    network = Network((6, 5, 3), "cross_entropy")
    weights = {name: tensor * np.float32(1e30) for name, tensor in network.initial_weights(0).items()}
    features, labels = batch(4)
    loss, gradient = gradient_of(network, weights, features, labels)
    assert not np.isfinite(loss)
    assert not all(np.isfinite(tensor).all() for tensor in gradient.values())


def test_initial_weights_are_a_function_of_the_seed() -> None:
    first, again, other = (Network((6, 5, 3), "mse").initial_weights(seed) for seed in (3, 3, 4))
    for name, tensor in first.items():
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, again[name])
    assert not np.array_equal(first["layers.0.weight"], other["layers.0.weight"])


@each_activation
def test_initial_weights_have_the_deviation_of_their_initialisation(activation: ActivationName) -> None:
    tensors = Network((400, 300, 200), "cross_entropy", activation).initial_weights(0)
    hidden = tensors["layers.0.weight"]
    output = tensors["layers.1.weight"]
    glorot = [np.sqrt(6 / (400 + 300)), np.sqrt(6 / (300 + 200))]
    deviation = glorot[0] / np.sqrt(3) if activation == "tanh" else np.sqrt(2 / 400)
    assert hidden.std() == pytest.approx(deviation, rel=0.01)
    assert hidden.mean() == pytest.approx(0, abs=4 * deviation / np.sqrt(hidden.size))
    assert (np.abs(hidden).max() <= glorot[0]) == (activation == "tanh")
    assert glorot[1] * 0.99 < np.abs(output).max() <= glorot[1]
    assert not tensors["layers.0.bias"].any()
    assert not tensors["layers.1.bias"].any()
