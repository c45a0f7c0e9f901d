"""Mean losses over a batch, and their gradients with respect to the model's outputs.

Sums and maxima call `ufunc.reduce`, because `np.sum` and `np.max` take several microseconds more per call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from psgd_workers.models.numpy.layers import Array
from psgd_workers.spec import LossName

__all__ = ["LOSSES", "Loss", "binary_cross_entropy", "cross_entropy", "mse"]


class Loss(Protocol):
    """A mean loss over a batch.

    It equals PyTorch's `cross_entropy`, `mse_loss` or `binary_cross_entropy_with_logits`.
    """

    def __call__(self, outputs: Array, labels: NDArray[Any], gradient: Array) -> float:
        """Compute the mean loss, and write its gradient.

        Args:
            outputs: outputs of the model, `[batch, num_outputs]`.
            labels: labels of the batch, in the dtype and shape that `open_dataset` gives them.
            gradient: array like `outputs`, overwritten with ∂loss/∂outputs. It may be `outputs` itself.

        Returns:
            The mean loss over the batch.
        """


def cross_entropy(outputs: Array, labels: NDArray[Any], gradient: Array) -> float:
    """Compute mean(log Σⱼ exp zⱼ - z_label) for logits z `[batch, classes]` and labels `[batch]` int64."""
    rows = np.arange(len(labels))
    # Softmax does not change when a row is shifted; with the largest logit at 0, exp cannot overflow.
    np.subtract(outputs, np.maximum.reduce(outputs, axis=1, keepdims=True), out=gradient)
    label_logits = gradient[rows, labels]
    np.exp(gradient, out=gradient)
    sums = np.add.reduce(gradient, axis=1)
    gradient *= (1 / (len(labels) * sums))[:, np.newaxis]
    gradient[rows, labels] -= 1 / len(labels)
    return float(np.add.reduce(np.log(sums) - label_logits, dtype=np.float64)) / len(labels)


def mse(outputs: Array, labels: NDArray[Any], gradient: Array) -> float:
    """Compute mean((outputs - labels)²) over all elements, for outputs and labels `[batch, targets]`."""
    np.subtract(outputs, labels, out=gradient)
    loss = float(np.vdot(gradient, gradient)) / gradient.size
    gradient *= 2 / gradient.size
    return loss


def binary_cross_entropy(outputs: Array, labels: NDArray[Any], gradient: Array) -> float:
    """Compute mean(log(1 + exp z) - y·z) for logits z `[batch, 1]` and labels y `[batch]`, 0 or 1."""
    logits = outputs[:, 0]
    loss = float(np.mean(np.logaddexp(0, logits) - labels * logits, dtype=np.float64))
    sigmoid = np.exp(-np.logaddexp(0, -logits))  # stable: 1 / (1 + exp(-z)) overflows for large -z
    gradient[:, 0] = (sigmoid - labels) / len(labels)
    return loss


LOSSES: Mapping[LossName, Loss] = {
    "binary_cross_entropy": binary_cross_entropy,
    "cross_entropy": cross_entropy,
    "mse": mse,
}
