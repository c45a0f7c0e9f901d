"""Layout of the flat vector that servers hold and lanes carry: slice and shape of each named tensor."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from math import prod
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from psgd_workers.counting import counted
from psgd_workers.errors import ModelError
from psgd_workers.messages import FloatArray

__all__ = ["Layout"]

Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True, slots=True)
class Layout:
    """Names, shapes and order of the tensors in a flat vector: trained parameters first, then buffers.

    A *buffer* is state that a step changes without a gradient, such as the running mean of a batch normalisation. It
    lies in the same vector after the parameters, and no optimizer changes it.

    Attributes:
        names: names of the tensors, in their order in the vector.
        shapes: shapes of the tensors, in the same order.
        num_trainable: number of values before the first buffer.
        num_parameters: length of the flat vector, with buffers.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    num_trainable: int
    num_parameters: int = field(init=False, repr=False, compare=False)
    _parts: tuple[slice, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ends = [0, *accumulate(prod(shape) for shape in self.shapes)]
        object.__setattr__(self, "num_parameters", ends[-1])
        object.__setattr__(self, "_parts", tuple(slice(start, stop) for start, stop in pairwise(ends)))

    @classmethod
    def of(cls, tensors: Mapping[str, NDArray[Any]], buffers: Collection[str] = ()) -> Layout:
        """Return the layout of `tensors` in their order, with the tensors named in `buffers` last.

        Args:
            tensors: tensors by name.
            buffers: names of the tensors that are buffers.

        Raises:
            ModelError: a name in `buffers` is not among the tensors, or no tensor is trainable.
        """
        if unknown := set(buffers) - set(tensors):
            raise ModelError(f"the model's buffers {sorted(unknown)} are not among its weights {list(tensors)}")
        names = sorted(tensors, key=lambda name: name in buffers)
        shapes = tuple(tuple(np.shape(tensors[name])) for name in names)
        trainable = sum(prod(shape) for name, shape in zip(names, shapes, strict=True) if name not in buffers)
        if trainable == 0:
            raise ModelError(f"the model has no trainable parameters: its weights are {list(tensors)}")
        return cls(tuple(names), shapes, trainable)

    def views(self, flat: NDArray[Scalar]) -> dict[str, NDArray[Scalar]]:
        """Return the named tensors as views of a flat vector: writing to them writes to the vector.

        Args:
            flat: vector `[num_parameters]`.

        Raises:
            ModelError: the vector has another length.
        """
        if flat.shape != (self.num_parameters,):
            raise ModelError(
                f"a flat vector of shape {flat.shape} does not fit this layout, which has "
                f"{counted(self.num_parameters, 'value')}"
            )
        parts = zip(self.names, self._parts, self.shapes, strict=True)
        return {name: flat[part].reshape(shape) for name, part, shape in parts}

    def pack(self, tensors: Mapping[str, NDArray[Any]]) -> FloatArray:
        """Return a new flat float32 vector with the values of `tensors`."""
        flat = np.empty(self.num_parameters, np.float32)
        for name, view in self.views(flat).items():
            view[...] = tensors[name]
        return flat
