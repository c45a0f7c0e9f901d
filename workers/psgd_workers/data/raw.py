"""What a reader found in its format, with the names to use in messages about it; nothing is checked yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

__all__ = ["RawArray", "RawData", "RawPart"]


@dataclass(frozen=True, slots=True)
class RawArray:
    """An array, and what to call it in a message."""

    name: str  # "mnist.npz: x_train"
    values: NDArray[Any]  # of any dtype and shape; nobody else's, since features are normalised in place


@dataclass(frozen=True, slots=True)
class RawPart:
    """The features and labels of the training part, or of the validation part."""

    features: RawArray
    labels: RawArray


@dataclass(frozen=True, slots=True)
class RawData:
    """All that a reader found."""

    parts: tuple[RawPart, ...]  # the training part, then the validation part if there is one
    classes: tuple[str, ...] | None = None  # names of the classes 0, 1, ..., if the format has them
