"""The pattern of Ray's documented asynchronous parameter server, on the measured network.

An actor holds the model and answers each gradient with the new weights; two actors compute gradients; the driver passes
object references from one to the other. As documented, weights travel as a state dict and gradients as a list of
arrays. The evaluation after every tenth update is left out, because it would count as training time.

References:
    https://docs.ray.io/en/latest/ray-core/examples/plot_parameter_server.html
"""

from __future__ import annotations

import os
from itertools import count
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from tests.benchmarks.measurement import Measurement, Span, repeat, run_command_line
from tests.benchmarks.mnist import Batches, Mnist
from tests.benchmarks.network import accuracy, backpropagate, network
from tests.benchmarks.process_group import ONE_THREAD
from tests.benchmarks.setting import LEARNING_RATE, NUM_WORKERS

__all__ = ["DataWorker", "ParameterServer", "measure"]


class ParameterServer:
    """Holds the weights and takes the steps."""

    def __init__(self) -> None:
        self.model = network()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE)

    def apply_gradients(self, *gradients: list[NDArray[np.float32]]) -> dict[str, torch.Tensor]:
        """Take a step on the sum of the gradients, and return the new weights."""
        sums = [np.stack(of_one_tensor).sum(axis=0) for of_one_tensor in zip(*gradients, strict=True)]
        for parameter, gradient in zip(self.model.parameters(), sums, strict=True):
            parameter.grad = torch.from_numpy(gradient)
        self.optimizer.step()
        return self.get_weights()

    def get_weights(self) -> dict[str, torch.Tensor]:
        """Return the weights by name."""
        return self.model.state_dict()


class DataWorker:
    """Computes the gradients of batches of its own."""

    def __init__(self, rank: int) -> None:
        self.model = network()
        self.batches = Batches(Mnist.load(), seed=rank)
        self.indices = count()

    def compute_gradients(self, weights: dict[str, torch.Tensor]) -> list[NDArray[np.float32]]:
        """Return the gradient of the next batch at `weights`, one array for each tensor."""
        self.model.load_state_dict(weights)
        backpropagate(self.model, *self.batches[next(self.indices)])
        return [parameter.grad.numpy() for parameter in self.model.parameters() if parameter.grad is not None]


def measure(seconds: float) -> Measurement:
    """Measure the updates per second of the server, on a Ray cluster of its own."""
    os.environ.update(ONE_THREAD, RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled")
    with TemporaryDirectory(prefix="ray") as folder:
        ray.init(address="local", num_cpus=NUM_WORKERS, include_dashboard=False, _temp_dir=folder)
        try:
            span, weights = _train(seconds)
        finally:
            ray.shutdown()
    model = network()
    model.load_state_dict(weights)
    return Measurement.of("ray_documented", span, accuracy(model, Mnist.load()))


def _train(seconds: float) -> tuple[Span, dict[str, torch.Tensor]]:
    server: Any = ray.remote(ParameterServer).remote()
    workers: list[Any] = [ray.remote(DataWorker).remote(rank) for rank in range(NUM_WORKERS)]
    weights = server.get_weights.remote()
    computing = {worker.compute_gradients.remote(weights): worker for worker in workers}

    def update() -> None:
        (gradient, *_), _ = ray.wait(list(computing))
        worker = computing.pop(gradient)
        computing[worker.compute_gradients.remote(server.apply_gradients.remote(gradient))] = worker

    span = repeat(update, lambda span: span.seconds < seconds)
    return span, ray.get(server.get_weights.remote())


if __name__ == "__main__":
    run_command_line(measure, __doc__)
