"""A plain SGD loop in NumPy, in each of two processes that share nothing."""

from __future__ import annotations

from itertools import count, pairwise
from multiprocessing.synchronize import Barrier

import numpy as np
from numpy.typing import NDArray

from psgd_workers.messages import FloatArray
from tests.benchmarks.measurement import Measurement, Span, repeat, run_command_line
from tests.benchmarks.mnist import Batches, Mnist
from tests.benchmarks.process_group import SPAWN, run_process_group
from tests.benchmarks.setting import LEARNING_RATE, NUM_WORKERS, SIZES

__all__ = ["NumpyMlp", "measure"]


class NumpyMlp:
    """A relu network with cross-entropy loss and a hand-written backward pass."""

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        shapes = list(pairwise(SIZES))
        self.weights = [random.normal(0, (2 / i) ** 0.5, (i, o)).astype(np.float32) for i, o in shapes]  # [in, out]
        self.biases = [np.zeros(o, np.float32) for _, o in shapes]

    def activations(self, features: FloatArray) -> list[FloatArray]:
        """Return the features, the outputs of each hidden layer, and the logits."""
        layers = [features]
        for weight, bias in zip(self.weights, self.biases, strict=True):
            if len(layers) > 1:
                np.maximum(layers[-1], 0, out=layers[-1])
            outputs = layers[-1] @ weight
            outputs += bias
            layers.append(outputs)
        return layers

    def gradients(self, features: FloatArray, labels: NDArray[np.int64]) -> list[tuple[FloatArray, FloatArray]]:
        """Return the gradients of the mean loss as (weight, bias) of each layer, from the last layer to the first."""
        *layers, logits = self.activations(features)
        error = np.exp(logits - logits.max(axis=1, keepdims=True))
        error /= error.sum(axis=1, keepdims=True)
        error[np.arange(len(labels)), labels] -= 1
        error /= len(labels)
        gradients = []
        for layer in reversed(range(len(layers))):
            gradients.append((layers[layer].T @ error, error.sum(axis=0)))
            if layer > 0:
                error = error @ self.weights[layer].T
                error *= layers[layer] > 0
        return gradients

    def step(self, features: FloatArray, labels: NDArray[np.int64]) -> None:
        """Take one step of SGD on a batch."""
        gradients = reversed(self.gradients(features, labels))
        for weight, bias, (by_weight, by_bias) in zip(self.weights, self.biases, gradients, strict=True):
            by_weight *= LEARNING_RATE
            weight -= by_weight
            bias -= LEARNING_RATE * by_bias

    def accuracy(self, data: Mnist) -> float:
        """Return the accuracy on the test images."""
        guesses = self.activations(data.test_features)[-1].argmax(axis=1)
        return float((guesses == data.test_labels).mean())


def measure(seconds: float) -> Measurement:
    """Measure the updates per second of both loops together."""
    spans, accuracies = zip(*run_process_group(NUM_WORKERS, _loop, SPAWN.Barrier(NUM_WORKERS), seconds), strict=True)
    return Measurement.of("numpy_loops", Span.over(spans), accuracies[0])


def _loop(rank: int, start: Barrier, seconds: float) -> tuple[Span, float]:
    data = Mnist.load()
    model = NumpyMlp(seed=rank)
    batches = Batches(data, seed=rank)
    indices = count()
    start.wait(timeout=60)
    span = repeat(lambda: model.step(*batches[next(indices)]), lambda span: span.seconds < seconds)
    return span, model.accuracy(data)


if __name__ == "__main__":
    run_command_line(measure, __doc__)
