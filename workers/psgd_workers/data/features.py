"""Checks and converts features: to finite float32 values, or uint8, with one example per row."""

from __future__ import annotations

import numpy as np

from psgd_workers.data.examples import Features
from psgd_workers.data.memory import check_memory
from psgd_workers.data.raw import RawArray
from psgd_workers.errors import DataError
from psgd_workers.messages import FloatArray
from psgd_workers.quoting import shown

__all__ = ["check_finite", "row_features"]


def row_features(raw: RawArray) -> Features:
    """Return the features as a C-contiguous array `[num_examples, *example_shape]`. A vector becomes one column.

    The dtype uint8 is kept. Every other dtype becomes float32.

    Raises:
        DataError: the values are not numbers, the array is empty, or a value is not finite in float32.
    """
    if raw.values.dtype.kind not in "biuf":
        raise DataError(
            f"{raw.name} has dtype {shown(str(raw.values.dtype))}; expected integers, floats or bools: convert it first"
        )
    if raw.values.size == 0 or raw.values.ndim == 0:
        raise DataError(f"{raw.name} has shape {raw.values.shape}; expected [examples, ...] with at least one example")
    values = raw.values[:, np.newaxis] if raw.values.ndim == 1 else raw.values
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    if values.dtype != np.float32:
        check_memory(raw.name, 4 * values.size)
    with np.errstate(over="ignore"):  # an overflow gives an infinity, which is refused below
        features = np.ascontiguousarray(values, np.float32)
    check_finite(raw.name, features)
    return features


def check_finite(name: str, values: FloatArray) -> None:
    """Refuse NaN and infinities.

    Args:
        name: name of the values for the message.
        values: `[examples, ...]`, not empty.

    Raises:
        DataError: a value is not finite; the message names the first one.
    """
    if np.isfinite(values.min()) and np.isfinite(values.max()):  # min and max propagate NaN, and need no extra memory
        return
    row, *rest = map(int, np.unravel_index(int(np.isfinite(values).argmin()), values.shape))
    column = rest[0] if len(rest) == 1 else tuple(rest)
    raise DataError(
        f"{name}: row {row}, column {column} (from 0) is {values[row, *rest]} in float32; expected finite numbers: "
        "fill the value in, or drop the row"
    )
