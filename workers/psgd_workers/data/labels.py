"""Labels as every model wants them: int64 classes from 0, or float32 targets, decided by their dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psgd_workers.data.features import check_finite
from psgd_workers.data.raw import RawArray
from psgd_workers.errors import DataError
from psgd_workers.messages import FloatArray

__all__ = ["encode_labels"]

MAX_CLASSES = 1 << 20  # more than any vocabulary: labels beyond are amounts or identifiers
KINDS = {"b": "integers", "i": "integers", "u": "integers", "f": "floats", "U": "text"}


def encode_labels(
    parts: Sequence[RawArray], names: tuple[str, ...] | None = None
) -> tuple[list[NDArray[Any]], tuple[str, ...] | None]:
    """The labels of every part, and the classes that the first part, the training part, has.

    Integers and bools are classes 0 to the largest; text becomes classes in sorted order; floats are targets.

    Args:
        parts: the training labels, then the validation labels if there are some; not empty.
        names: of the classes 0, 1, ..., where the format knows them.

    Returns:
        Per part `[examples]` int64 and the name of each class, or `[examples, targets]` float32 and None.

    Raises:
        DataError: labels of the wrong dtype or shape, negative, not finite, or not among the training classes.
    """
    kinds = [_kind(part) for part in parts]
    if len(set(kinds)) > 1:
        raise DataError(f"{parts[1].name} holds {kinds[1]}, but {parts[0].name} {kinds[0]}; give both the same dtype")
    if kinds[0] == "floats":
        return _all_targets(parts), None
    if kinds[0] == "text":
        classes = tuple(sorted(set(_flat(parts[0]).tolist())))
        return [_text_codes(part, classes) for part in parts], classes
    classes = names or _numbered(parts[0])
    return [_integer_codes(part, classes) for part in parts], classes


def _kind(raw: RawArray) -> str:
    if raw.values.dtype.kind not in KINDS:
        raise DataError(f"{raw.name} has dtype {raw.values.dtype}; expected integers, floats, bools or text")
    return KINDS[raw.values.dtype.kind]


def _all_targets(parts: Sequence[RawArray]) -> list[NDArray[Any]]:
    targets: list[NDArray[Any]] = [_targets(part) for part in parts]
    for raw, values in zip(parts, targets, strict=True):
        if values.shape[1] != targets[0].shape[1]:
            raise DataError(f"{raw.name} has {values.shape[1]} targets, but {parts[0].name} {targets[0].shape[1]}")
    return targets


def _targets(raw: RawArray) -> FloatArray:
    values = raw.values[:, np.newaxis] if raw.values.ndim == 1 else raw.values
    if values.ndim != 2 or values.shape[1] == 0:
        raise DataError(f"{raw.name} has shape {raw.values.shape}; expected [examples] or [examples, targets]")
    with np.errstate(over="ignore"):  # an overflow becomes infinite, which is refused below
        targets = np.ascontiguousarray(values, np.float32)
    check_finite(raw.name, targets)
    return targets


def _flat(raw: RawArray) -> NDArray[Any]:
    values = raw.values
    if values.ndim == 2 and values.shape[1] == 1:
        return values[:, 0]
    if values.ndim != 1:
        raise DataError(
            f"{raw.name} has dtype {values.dtype} and shape {values.shape}; expected one class per example, [examples] "
            "(for several targets per example, store them as floats)"
        )
    return values


def _numbered(raw: RawArray) -> tuple[str, ...]:
    largest = int(_flat(raw).max())
    if largest >= MAX_CLASSES:
        raise DataError(
            f"{raw.name}: label {largest} is beyond the {MAX_CLASSES} classes allowed; number the classes from 0, or "
            "store the labels as floats for a regression"
        )
    return tuple(str(label) for label in range(max(largest, 0) + 1))


def _integer_codes(raw: RawArray, classes: tuple[str, ...]) -> NDArray[np.int64]:
    values = _flat(raw)
    wrong = np.flatnonzero((values < 0) | (values >= len(classes)))
    if len(wrong):
        raise DataError(
            f"{raw.name}: row {wrong[0]} (from 0) has label {values[wrong[0]]}; expected the training classes, 0 to "
            f"{len(classes) - 1} (for a regression, store the labels as floats)"
        )
    return values.astype(np.int64)


def _text_codes(raw: RawArray, classes: tuple[str, ...]) -> NDArray[np.int64]:
    codes = {name: code for code, name in enumerate(classes)}
    labels = _flat(raw).tolist()
    for row, label in enumerate(labels):
        if label not in codes:
            raise DataError(f"{raw.name}: row {row} (from 0) has label {label!r}, which no training example has")
    return np.array([codes[label] for label in labels], np.int64)
