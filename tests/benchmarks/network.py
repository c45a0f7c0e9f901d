"""The measured network in PyTorch: 784-256-128-10, relu, 235,146 parameters."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from psgd_workers.messages import FloatArray
from tests.benchmarks.mnist import Mnist
from tests.benchmarks.setting import SIZES

__all__ = ["accuracy", "backpropagate", "network"]


def network() -> nn.Sequential:
    """Return the network, with weights drawn from seed 0. From then on PyTorch uses one thread in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    inputs, first, second, outputs = SIZES
    return nn.Sequential(
        nn.Linear(inputs, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, outputs)
    )


def backpropagate(model: nn.Module, features: FloatArray, labels: NDArray[np.int64]) -> None:
    """Set the parameters' gradients to those of the batch's mean cross-entropy."""
    model.zero_grad()
    torch.autograd.backward(functional.cross_entropy(model(torch.from_numpy(features)), torch.from_numpy(labels)))


def accuracy(model: nn.Module, data: Mnist) -> float:
    """Return the share of test images that the model classifies correctly."""
    with torch.no_grad():
        guesses = model(torch.from_numpy(data.test_features)).argmax(dim=1)
    return float((guesses.numpy() == data.test_labels).mean())
