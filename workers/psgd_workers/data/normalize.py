"""Normalises features by statistics of the training part.

Float32 features are changed in place and piece by piece, because the data may fill most of the memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from psgd_workers.data.examples import Examples, Features
from psgd_workers.data.memory import check_memory

__all__ = ["normalize"]

PIECE_SIZE = 1 << 20  # values converted to float64 at a time: 8 MiB

ShiftAndScale = tuple[NDArray[np.float64], NDArray[np.float64]]


def normalize(kind: Literal["none", "unit", "standardize"], train: Examples, *others: Examples) -> tuple[Examples, ...]:
    """Replace x by (x - shift) / scale, computed in float64.

    `unit`: shift = min, scale = max - min, one pair for all features. `standardize`: shift = mean, scale =
    population standard deviation, one pair per feature. A scale of 0 is replaced by 1, so that constants become 0.

    Args:
        kind: the normalisation; `none` changes nothing.
        train: training examples, from which shift and scale are computed. Float32 features are overwritten.
        others: other examples, such as the validation part, transformed by the same shift and scale.

    Returns:
        The parts, in the order of the arguments. `unit` keeps uint8 features as they are, and `Examples.inputs`
        normalises them batch by batch; `standardize` converts them to float32.

    Raises:
        DataError: the converted features do not fit into memory.
    """
    parts = (train, *others)
    if kind == "none":
        return parts
    if kind == "standardize":
        check_memory(
            "the normalised copy of the features",
            4 * sum(part.features.size for part in parts if part.features.dtype == np.uint8),
        )
        parts = tuple(replace(part, features=part.features.astype(np.float32, copy=False)) for part in parts)
    shift, scale = _unit_statistics(train.features) if kind == "unit" else _standard_statistics(parts[0].features)
    scale = np.where(scale == 0, 1.0, scale)
    for part in parts:
        if part.features.dtype == np.float32:
            for piece in _pieces(part.features):
                piece[...] = (piece - shift) / scale
    return tuple(
        part if part.features.dtype == np.float32 else replace(part, shift=float(shift), scale=float(scale))
        for part in parts
    )


def _unit_statistics(features: Features) -> ShiftAndScale:
    low, high = (np.asarray(bound, np.float64) for bound in (features.min(), features.max()))
    return low, np.asarray(high - low)


def _standard_statistics(features: Features) -> ShiftAndScale:
    mean = features.mean(axis=0, dtype=np.float64)
    squares = np.zeros_like(mean)
    for piece in _pieces(features):
        squares += np.square(piece - mean).sum(axis=0)
    return mean, np.sqrt(squares / len(features))


def _pieces(features: Features) -> Iterator[Features]:
    rows = max(1, PIECE_SIZE * len(features) // features.size)
    return (features[start : start + rows] for start in range(0, len(features), rows))
