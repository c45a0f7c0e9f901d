"""Arrays of examples, as every data format yields them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from psgd_workers.messages import FloatArray

__all__ = ["Dataset", "Examples"]


@dataclass(frozen=True, slots=True)
class Examples:
    """Features and labels, row by row."""

    features: FloatArray  # [num_examples, *example_shape], C-contiguous
    labels: NDArray[Any]  # [num_examples] int64 (classes) or [num_examples, targets] float32 (regression)

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: slice) -> Examples:
        """Some rows, as views."""
        return Examples(self.features[rows], self.labels[rows])


@dataclass(frozen=True, slots=True)
class Dataset:
    """The data of a job, normalised and split, ready to be trained on."""

    train: Examples
    validation: Examples | None
    classes: tuple[str, ...] | None  # the label of each class; None if the labels are not classes
    fingerprint: str  # SHA-256 over the training arrays: the same data has the same fingerprint
