"""Arrays of examples, as every data format yields them."""

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
    """Features and labels, row by row.

    Bytes, as most images are made of, stay bytes: they take a quarter of the memory, and half the time to make a batch
    of. `inputs` normalises them; features of any other type are normalised float32 already.
    """

    features: Features  # [num_examples, *example_shape], C-contiguous
    labels: NDArray[Any]  # [num_examples] int64 (classes) or [num_examples, targets] float32 (regression)
    shift: float = 0.0  # of bytes: what is subtracted from them, ...
    scale: float = 1.0  # ... and what the difference is divided by

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: slice) -> Examples:
        """Some rows, as views."""
        return replace(self, features=self.features[rows], labels=self.labels[rows])

    def inputs(self, rows: slice | NDArray[np.int64]) -> FloatArray:
        """Return the features of some rows, as every model wants them: normalised float32, `[rows, *example_shape]`.

        The array is always a copy: a model may change its inputs in place, in training and in validation.
        """
        # `take` is faster than an index, and copies.
        taken = self.features[rows] if isinstance(rows, slice) else self.features.take(rows, axis=0)
        if taken.dtype == np.float32:
            return cast(FloatArray, taken.copy() if isinstance(rows, slice) else taken)
        # Where the training part is of bytes, float32 comes to what float64 does: both numbers are whole.
        inputs = taken.astype(np.float32)
        if self.shift:
            inputs -= self.shift
        if self.scale != 1:
            inputs /= self.scale
        return inputs


@dataclass(frozen=True, slots=True)
class Dataset:
    """The data of a job, split, ready to be trained on."""

    train: Examples
    validation: Examples | None
    classes: tuple[str, ...] | None  # the label of each class; None if the labels are not classes
    fingerprint: str  # SHA-256 of the content: both parts, class names, and the kind of normalisation
