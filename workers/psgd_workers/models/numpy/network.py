"""The linear model and the multi-layer perceptron in NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psgd_workers.messages import FloatArray
from psgd_workers.models.numpy.layers import ACTIVATIONS, ActivationName, Array, Dense
from psgd_workers.models.numpy.losses import LOSSES
from psgd_workers.spec import LossName

__all__ = ["Network"]


class Network:
    """A network of dense layers with activations between them. A single layer is the linear model.

    The tensors are `layers.0.weight`, `layers.0.bias`, `layers.1.weight`, and so on. Examples of any shape
    are flattened. Calls share memory, so only one thread may use a network.

    Args:
        sizes: number of values of the input, of each hidden layer and of the output.
        loss: loss of the outputs.
        activation: name of the activation between layers.
    """

    def __init__(self, sizes: tuple[int, ...], loss: LossName, activation: ActivationName = "relu") -> None:
        self._sizes = sizes
        self._loss = LOSSES[loss]
        self._activation = activation
        self._layers = [Dense() for _ in pairwise(sizes)]
        self._names = [(f"layers.{number}.weight", f"layers.{number}.bias") for number in range(len(self._layers))]
        self._activations = [ACTIVATIONS[activation]() for _ in sizes[1:-1]]

    @property
    def num_parameters(self) -> int:
        """Return the number of values of all tensors."""
        return sum((fan_in + 1) * fan_out for fan_in, fan_out in pairwise(self._sizes))

    def initial_weights(self, seed: int) -> dict[str, FloatArray]:
        """Draw the initial weights: He's normal distribution before relu and gelu, Glorot's uniform one before tanh and
        the output.

        Biases are 0.

        References:
            Glorot and Bengio, Understanding the difficulty of training deep feedforward neural networks, 2010.
            He et al., Delving deep into rectifiers, 2015.
        """
        rng = np.random.default_rng(seed)
        tensors: dict[str, FloatArray] = {}
        for (weight, bias), (fan_in, fan_out) in zip(self._names, pairwise(self._sizes), strict=True):
            is_output = weight == self._names[-1][0]
            initial = _glorot_uniform if is_output or self._activation == "tanh" else _he_normal
            tensors[weight] = initial(rng, fan_in, fan_out)
            tensors[bias] = np.zeros(fan_out, np.float32)
        return tensors

    def loss_and_gradient(
        self,
        weights: Mapping[str, FloatArray],
        features: FloatArray,
        labels: NDArray[Any],
        gradient: Mapping[str, FloatArray],
        seed: int,
    ) -> float:
        """Backpropagate one batch. See `Model.loss_and_gradient`."""
        del seed  # no layer here draws at random
        # Overflow in a model that diverges is ignored here, because the norm of the gradient shows it.
        with np.errstate(over="ignore", invalid="ignore"):
            *inputs, outputs = self._forward(weights, features)
            loss = self._loss(outputs, labels, gradient=outputs)
            self._backward(weights, inputs, outputs, gradient)
        return loss

    def predict(self, weights: Mapping[str, FloatArray], features: FloatArray) -> FloatArray:
        """Return the outputs `[batch, num_outputs]`. See `Model.predict`."""
        with np.errstate(over="ignore", invalid="ignore"):
            return self._forward(weights, features)[-1].copy()

    def loss(self, outputs: FloatArray, labels: NDArray[Any]) -> float:
        """Return the mean loss of outputs. See `Model.loss`."""
        with np.errstate(over="ignore", invalid="ignore"):
            return self._loss(outputs, labels, gradient=np.empty_like(outputs))

    def _forward(self, weights: Mapping[str, FloatArray], features: FloatArray) -> list[Array]:
        """Return the input of each layer, then the outputs of the last layer."""
        values: list[Array] = [features.reshape(len(features), -1)]
        for number, layer in enumerate(self._layers):
            if number > 0:
                self._activations[number - 1].forward(values[-1])
            weight, bias = self._names[number]
            values.append(layer.forward(values[-1], weights[weight], weights[bias]))
        return values

    def _backward(
        self,
        weights: Mapping[str, FloatArray],
        inputs: list[Array],
        output_gradient: Array,
        gradient: Mapping[str, FloatArray],
    ) -> None:
        for number in reversed(range(len(self._layers))):
            layer = self._layers[number]
            weight, bias = self._names[number]
            layer.parameter_gradient(inputs[number], output_gradient, gradient[weight], gradient[bias])
            if number > 0:
                output_gradient = layer.input_gradient(output_gradient, weights[weight])
                self._activations[number - 1].backward(inputs[number], output_gradient)


def _he_normal(rng: np.random.Generator, fan_in: int, fan_out: int) -> FloatArray:
    return rng.normal(0, sqrt(2 / fan_in), (fan_out, fan_in)).astype(np.float32)


def _glorot_uniform(rng: np.random.Generator, fan_in: int, fan_out: int) -> FloatArray:
    limit = sqrt(6 / (fan_in + fan_out))
    return rng.uniform(-limit, limit, (fan_out, fan_in)).astype(np.float32)
