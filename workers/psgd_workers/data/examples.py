"""Examples as arrays: the result of reading any data format."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from psgd_workers.messages import FloatArray

__all__ = ["Dataset", "Examples", "Features"]

Features = FloatArray | NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Examples:
    """Features and labels, one example per row.

    Features of dtype uint8, such as images, stay uint8: they take a quarter of the memory, and half the time to cut a
    batch. `inputs` normalises them. All other features are float32, already normalised.
    """

    features: Features  # [num_examples, *example_shape], C-contiguous
    labels: NDArray[Any]  # [num_examples] int64 (classes) or [num_examples, targets] float32 (regression)
    shift: float = 0.0  # for uint8 features only: input = (feature - shift) / scale
    scale: float = 1.0

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.features)

    def __getitem__(self, rows: slice) -> Examples:
        """Return the examples of some rows, as views."""
        return replace(self, features=self.features[rows], labels=self.labels[rows])

    def inputs(self, rows: slice | NDArray[np.int64]) -> FloatArray:
        """Return the inputs of a model for some rows: normalised features, `[rows, *example_shape]` float32.

        The result is always a copy, because a model may change its inputs in place.
        """
        # `take` copies, and is faster than indexing.
        taken = self.features[rows] if isinstance(rows, slice) else self.features.take(rows, axis=0)
        if taken.dtype == np.float32:
            return cast(FloatArray, taken.copy() if isinstance(rows, slice) else taken)
        # If the training part is uint8, shift and scale are integers, and float32 gives the same values as float64.
        inputs = taken.astype(np.float32)
        if self.shift:
            inputs -= self.shift
        if self.scale != 1:
            inputs /= self.scale
        return inputs


@dataclass(frozen=True, slots=True)
class Dataset:
    """The data of a job, split and encoded, ready for training."""

    train: Examples
    validation: Examples | None
    classes: tuple[str, ...] | None  # name of each class; None for a regression
    fingerprint: str  # SHA-256 of both parts before normalisation, the class names and the kind of normalisation
