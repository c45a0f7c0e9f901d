"""Unchecked arrays as a format's reader returns them, with names for error messages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

__all__ = ["RawArray", "RawData", "RawPart"]


@dataclass(frozen=True, slots=True)
class RawArray:
    """An array and its name for error messages."""

    name: str  # such as "mnist.npz: x_train"
    values: NDArray[Any]  # any dtype and shape; owned by this object, since features are normalised in place


@dataclass(frozen=True, slots=True)
class RawPart:
    """Features and labels of one part: the training part or the validation part."""

    features: RawArray
    labels: RawArray


@dataclass(frozen=True, slots=True)
class RawData:
    """The unchecked content of a data set."""

    parts: tuple[RawPart, ...]  # the training part, then the validation part if there is one
    classes: tuple[str, ...] | None = None  # names of the classes 0, 1, ..., if the format has them
