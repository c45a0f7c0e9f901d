from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from psgd_workers.models.numpy.layers import ACTIVATIONS, ActivationName, Dense

NumericalGradient = Callable[[Callable[[], float], NDArray[Any]], NDArray[np.float64]]

TORCH_ACTIVATIONS: dict[ActivationName, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.nn.ReLU(),
    "tanh": torch.nn.Tanh(),
    "gelu": torch.nn.GELU(approximate="tanh"),
}

each_activation = pytest.mark.parametrize("name", ACTIVATIONS)


def doubles(*shape: int, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(0, 2, shape)


def test_dense_is_torch_linear() -> None:
    inputs = doubles(5, 3)
    weight = doubles(4, 3, seed=1)
    bias = doubles(4, seed=2)
    output_gradient = doubles(5, 4, seed=3)
    tensors = [torch.from_numpy(array.copy()).requires_grad_() for array in (inputs, weight, bias)]
    expected = torch.nn.functional.linear(*tensors)
    expected.backward(torch.from_numpy(output_gradient))  # type: ignore[no-untyped-call]

    layer = Dense()
    weight_gradient = np.full_like(weight, np.nan)
    bias_gradient = np.full_like(bias, np.nan)
    np.testing.assert_allclose(layer.forward(inputs, weight, bias), expected.detach(), rtol=1e-12)
    layer.parameter_gradient(inputs, output_gradient, weight_gradient, bias_gradient)
    gradients = layer.input_gradient(output_gradient, weight), weight_gradient, bias_gradient
    for gradient, tensor in zip(gradients, tensors, strict=True):
        assert tensor.grad is not None
        np.testing.assert_allclose(gradient, tensor.grad, rtol=1e-6)


def test_dense_matches_central_differences(numerical_gradient: NumericalGradient) -> None:
    inputs = doubles(5, 3)
    weight = doubles(4, 3, seed=1)
    bias = doubles(4, seed=2)
    output_gradient = doubles(5, 4, seed=3)
    layer = Dense()

    def objective() -> float:
        return float(np.sum(output_gradient * layer.forward(inputs, weight, bias)))

    weight_gradient = np.empty_like(weight)
    bias_gradient = np.empty_like(bias)
    layer.parameter_gradient(inputs, output_gradient, weight_gradient, bias_gradient)
    np.testing.assert_allclose(weight_gradient, numerical_gradient(objective, weight), rtol=1e-6)
    np.testing.assert_allclose(bias_gradient, numerical_gradient(objective, bias), rtol=1e-6)
    np.testing.assert_allclose(
        layer.input_gradient(output_gradient, weight), numerical_gradient(objective, inputs), rtol=1e-6
    )


@each_activation
def test_activation_is_torchs(name: ActivationName) -> None:
    values = doubles(6, 7)
    output_gradient = doubles(6, 7, seed=1)
    tensor = torch.from_numpy(values.copy()).requires_grad_()
    expected = TORCH_ACTIVATIONS[name](tensor)
    expected.backward(torch.from_numpy(output_gradient.copy()))  # type: ignore[no-untyped-call]

    activation = ACTIVATIONS[name]()
    activation.forward(values)
    np.testing.assert_allclose(values, expected.detach(), rtol=1e-6, atol=1e-12)
    activation.backward(values, output_gradient)
    assert tensor.grad is not None
    np.testing.assert_allclose(output_gradient, tensor.grad, rtol=1e-6, atol=1e-12)


@each_activation
def test_activation_matches_central_differences(name: ActivationName, numerical_gradient: NumericalGradient) -> None:
    inputs = doubles(6, 7)
    output_gradient = doubles(6, 7, seed=1)
    activation = ACTIVATIONS[name]()

    def objective() -> float:
        values = inputs.copy()
        ACTIVATIONS[name]().forward(values)
        return float(np.sum(output_gradient * values))

    expected = numerical_gradient(objective, inputs)
    values = inputs.copy()
    activation.forward(values)
    activation.backward(values, output_gradient)
    np.testing.assert_allclose(output_gradient, expected, rtol=1e-6, atol=1e-8)


def test_relu_has_slope_zero_at_zero() -> None:
    values = np.array([[-1.0, 0.0, 1.0]])
    output_gradient = np.ones((1, 3))
    relu = ACTIVATIONS["relu"]()
    relu.forward(values)
    relu.backward(values, output_gradient)
    np.testing.assert_array_equal(output_gradient, [[0, 0, 1]])


@each_activation
def test_activation_saturates_without_warnings(name: ActivationName) -> None:
    values = np.array([[-1e4, 1e4]], np.float32)
    output_gradient = np.ones((1, 2), np.float32)
    activation = ACTIVATIONS[name]()
    activation.forward(values)
    activation.backward(values, output_gradient)
    np.testing.assert_allclose(output_gradient, [[0, 0 if name == "tanh" else 1]], atol=1e-6)


@each_activation
def test_a_layer_keeps_the_dtype_and_its_buffers_serve_shorter_batches(name: ActivationName) -> None:
    weight = doubles(4, 3, seed=1).astype(np.float32)
    bias = doubles(4, seed=2).astype(np.float32)
    dense = Dense()
    activation = ACTIVATIONS[name]()

    def passes(inputs: NDArray[np.float32], dense: Dense = dense, activation: Any = activation) -> NDArray[Any]:
        values = dense.forward(inputs, weight, bias)
        output_gradient = np.ones_like(values)
        activation.forward(values)
        activation.backward(values, output_gradient)
        return dense.input_gradient(output_gradient, weight)

    long = doubles(8, 3).astype(np.float32)
    short = doubles(5, 3, seed=9).astype(np.float32)
    first = passes(long)
    assert first.dtype == np.float32
    first_values = first.copy()
    shorter = passes(short)
    assert np.shares_memory(first, shorter)
    np.testing.assert_array_equal(shorter, passes(short, Dense(), ACTIVATIONS[name]()))
    np.testing.assert_array_equal(passes(long), first_values)


@each_activation
def test_a_step_allocates_no_arrays_once_its_buffers_are_there(name: ActivationName) -> None:
    inputs = doubles(1024, 128)
    weight = doubles(128, 128, seed=1)
    bias = doubles(128, seed=2)
    weight_gradient = np.empty_like(weight)
    bias_gradient = np.empty_like(bias)
    output_gradient = doubles(1024, 128, seed=3)
    dense = Dense()
    activation = ACTIVATIONS[name]()

    def step() -> None:
        values = dense.forward(inputs, weight, bias)
        activation.forward(values)
        activation.backward(values, output_gradient)
        dense.parameter_gradient(inputs, output_gradient, weight_gradient, bias_gradient)
        dense.input_gradient(output_gradient, weight)

    step()
    tracemalloc.start()
    try:
        step()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < output_gradient.nbytes / 8  # one boolean mask; NumPy's own casting buffer has 64 KiB
