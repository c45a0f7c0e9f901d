"""Normalisation by the statistics of the training part, in place and piece by piece: the data may be most of memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from psgd_workers.messages import FloatArray

__all__ = ["normalize"]

PIECE = 1 << 20  # float64 values held at a time: 8 MiB

Moments = tuple[NDArray[np.float64], NDArray[np.float64]]


def normalize(kind: Literal["none", "unit", "standardize"], train: FloatArray, *others: FloatArray) -> None:
    """Replace x by (x - shift) / scale, computed in float64.

    `unit`: shift = min, scale = max - min, one pair over all the training features. `standardize`: shift = mean, scale
    = standard deviation (of the population), per feature. A scale of 0 is taken as 1, so that constants become 0.

    Args:
        kind: which; `none` leaves everything as it is.
        train: `[examples, ...]`, from which shift and scale are taken.
        others: arrays to transform alike.
    """
    if kind == "none":
        return
    shift, scale = _range(train) if kind == "unit" else _moments(train)
    scale = np.where(scale == 0, 1.0, scale)
    for features in (train, *others):
        for piece in _pieces(features):
            piece[...] = (piece - shift) / scale


def _range(features: FloatArray) -> Moments:
    low, high = (np.asarray(bound, np.float64) for bound in (features.min(), features.max()))
    return low, np.asarray(high - low)


def _moments(features: FloatArray) -> Moments:
    mean = features.mean(axis=0, dtype=np.float64)
    squares = np.zeros_like(mean)
    for piece in _pieces(features):
        squares += np.square(piece - mean).sum(axis=0)
    return mean, np.sqrt(squares / len(features))


def _pieces(features: FloatArray) -> Iterator[FloatArray]:
    rows = max(1, PIECE * len(features) // features.size)
    return (features[start : start + rows] for start in range(0, len(features), rows))
