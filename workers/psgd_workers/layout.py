"""Where each named tensor lies in the one flat vector that servers hold and lanes carry."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from psgd_workers.errors import ModelError
from psgd_workers.messages import FloatArray

__all__ = ["Layout"]

Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True, slots=True)
class Layout:
    """Names, shapes and order of the tensors in a flat vector: trained parameters first, then buffers.

    A *buffer* is state that a step changes without a gradient, such as a batch normalisation's running mean. It rides
    in the same vector behind the parameters; the optimizer never sees it.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    num_trainable: int  # values before the first buffer

    @classmethod
    def of(cls, tensors: Mapping[str, NDArray[Any]], buffers: Collection[str] = ()) -> Layout:
        """The layout that holds `tensors`, in their order, those named in `buffers` last."""
        if unknown := set(buffers) - set(tensors):
            raise ModelError(f"buffers {sorted(unknown)} are not among the weights {list(tensors)}")
        names = sorted(tensors, key=lambda name: name in buffers)
        shapes = tuple(tuple(np.shape(tensors[name])) for name in names)
        trainable = sum(prod(shape) for name, shape in zip(names, shapes, strict=True) if name not in buffers)
        if trainable == 0:
            raise ModelError(f"the model has no trainable parameters: its weights are {list(tensors)}")
        return cls(tuple(names), shapes, trainable)

    @property
    def num_parameters(self) -> int:
        """Length of the flat vector, buffers included."""
        return sum(prod(shape) for shape in self.shapes)

    def views(self, flat: NDArray[Scalar]) -> dict[str, NDArray[Scalar]]:
        """The named tensors of a flat vector, as views: writing to one writes to the vector."""
        if flat.shape != (self.num_parameters,):
            raise ModelError(
                f"a flat vector of shape {flat.shape} is not of this layout's {self.num_parameters} values"
            )
        views: dict[str, NDArray[Scalar]] = {}
        start = 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            stop = start + prod(shape)
            views[name] = flat[start:stop].reshape(shape)
            start = stop
        return views

    def pack(self, tensors: Mapping[str, NDArray[Any]]) -> FloatArray:
        """A new flat float32 vector with the values of `tensors`."""
        flat = np.empty(self.num_parameters, np.float32)
        for name, view in self.views(flat).items():
            view[...] = tensors[name]
        return flat
