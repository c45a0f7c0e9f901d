"""Evaluates one copy of the weights on a set of examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psgd_workers.data.examples import Examples
from psgd_workers.messages import Evaluation, FloatArray
from psgd_workers.models.protocol import Model

__all__ = ["ROWS_AT_ONCE", "evaluate"]

ROWS_AT_ONCE = 1024  # examples predicted at a time


def evaluate(
    model: Model, weights: Mapping[str, FloatArray], examples: Examples, rows_at_once: int = ROWS_AT_ONCE
) -> Evaluation:
    """Compute the mean loss over examples and, if their labels are classes, the accuracy.

    Args:
        model: model to evaluate.
        weights: named tensors of the model.
        examples: examples to predict, at least one.
        rows_at_once: number of examples predicted at a time. Higher: faster, but needs more memory.

    Returns:
        Loss, accuracy and number of examples.
    """
    total_loss = 0.0
    correct = 0
    has_classes = np.issubdtype(examples.labels.dtype, np.integer)
    for start in range(0, len(examples), rows_at_once):
        labels = examples.labels[start : start + rows_at_once]
        outputs = model.predict(weights, examples.inputs(slice(start, start + rows_at_once)))
        if has_classes:
            correct += int(np.count_nonzero(_classes(outputs) == labels))
        # Labels are copied because the model may change them in place.
        total_loss += model.loss(outputs, labels.copy()) * len(labels)
    return Evaluation(total_loss / len(examples), correct / len(examples) if has_classes else None, len(examples))


def _classes(outputs: FloatArray) -> NDArray[Any]:
    """Return the predicted class of each row: the index of the largest logit. A single logit above 0 means class 1."""
    return outputs.argmax(axis=1) if outputs.shape[1] > 1 else outputs[:, 0] > 0
