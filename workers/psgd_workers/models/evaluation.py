"""What one copy of the weights does on a set of examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psgd_workers.data.examples import Examples
from psgd_workers.messages import Evaluation, FloatArray
from psgd_workers.models.protocol import Model

__all__ = ["ROWS", "evaluate"]

ROWS = 1024  # examples predicted at once


def evaluate(model: Model, weights: Mapping[str, FloatArray], examples: Examples, rows: int = ROWS) -> Evaluation:
    """The mean loss over `examples` and, if the labels are classes, the share of them predicted rightly.

    Args:
        model: what predicts.
        weights: its tensors.
        examples: at least one.
        rows: how many examples are predicted at once. More: faster, in more memory.
    """
    total_loss = 0.0
    right = 0
    classified = np.issubdtype(examples.labels.dtype, np.integer)
    for start in range(0, len(examples), rows):
        labels = examples.labels[start : start + rows]
        outputs = model.predict(weights, examples.inputs(slice(start, start + rows)))
        if classified:
            right += int(np.count_nonzero(_classes(outputs) == labels))
        total_loss += model.loss(outputs, labels.copy()) * len(labels)  # which may write to both
    return Evaluation(total_loss / len(examples), right / len(examples) if classified else None, len(examples))


def _classes(outputs: FloatArray) -> NDArray[Any]:
    """The predicted class of each row: of the largest logit, or, with one logit, whether it is positive."""
    return outputs.argmax(axis=1) if outputs.shape[1] > 1 else outputs[:, 0] > 0
