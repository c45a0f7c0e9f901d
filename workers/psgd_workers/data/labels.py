"""Encodes labels for the loss of a model: as int64 classes from 0, or as float32 targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psgd_workers.counting import counted
from psgd_workers.data.features import check_finite
from psgd_workers.data.raw import RawArray
from psgd_workers.errors import DataError
from psgd_workers.messages import FloatArray
from psgd_workers.quoting import quoted, shown
from psgd_workers.spec import LossName

__all__ = ["check_two_classes", "encode_labels"]

MAX_CLASSES = 1 << 20  # larger than any vocabulary; labels beyond are taken for amounts or identifiers
MAX_WHOLE = 1 << 53  # beyond it float64 cannot represent every whole number
# T: texts of any length, which may end with NUL characters. NumPy drops these from texts of fixed length (U).
KIND_OF_DTYPE = {"b": "integers", "i": "integers", "u": "integers", "f": "floats", "U": "text", "T": "text"}
REGRESSION_HINT = "for a regression use `loss: mse`"
OWN_LOSS_HINT = "for a regression store the labels as floats (in a CSV file: 3.0 instead of 3)"

Codes = NDArray[np.int64]
Classes = tuple[str, ...]


def encode_labels(
    parts: Sequence[RawArray], loss: LossName | None, names: Classes | None = None
) -> tuple[list[NDArray[Any]], Classes | None]:
    """Encode the labels of every part for a loss.

    | loss | accepted labels | encoded as |
    |---|---|---|
    | `cross_entropy` | whole numbers from 0; two different whole numbers; text | classes |
    | `binary_cross_entropy` | 0 and 1; two different whole numbers; two different texts | classes |
    | `mse` | numbers, one or several for each example | targets |
    | None | integers from 0, bools and text | classes |
    | None | floats | targets |

    Whole numbers have an integer or bool dtype. A float dtype is accepted for two different whole numbers only: more of
    them are probably targets of a regression. Whole numbers from 0 become the classes from 0 to the
    largest training label. Two other values, and text, become classes in sorted order.

    Args:
        parts: the training labels, then the validation labels if there are some; not empty.
        loss: loss of the model; None for a model with a loss of its own.
        names: names of the classes 0, 1, ..., if the format has them.

    Returns:
        (labels by part, classes): for classes, `[examples]` int64 labels and the name of each class; for targets,
        `[examples, targets]` float32 labels and None.

    Raises:
        DataError: the labels have an unsuitable type or shape, are not finite, or are not among the training classes.
    """
    kinds = [_kind(part) for part in parts]
    _check_kinds(parts, kinds, loss)
    if loss == "mse":
        _check_targets(parts[0], kinds[0], names)
    if loss == "mse" or (loss is None and kinds[0] == "floats"):
        return _all_targets(parts), None
    if kinds[0] == "text":
        return _text_classes(parts, loss)
    return _number_classes(parts, loss, names)


def check_two_classes(name: str, labels: NDArray[Any], classes: Classes | None, loss: LossName | None) -> None:
    """Refuse to train a classifier on examples of a single class: its loss would reach 0 without any features.

    Args:
        name: name of the labels for the message.
        labels: encoded labels of the training part, not empty.
        classes: names of the classes; None for targets, which are not checked.
        loss: loss of the model; None for a model with a loss of its own, which is not checked.

    Raises:
        DataError: all training labels are the same class.
    """
    if loss is None or classes is None or (labels != labels[0]).any():
        return
    raise DataError(
        f"{name}: all {len(labels)} training labels are {quoted(classes[labels[0]])}, but loss {loss!r} needs examples "
        "of at least two classes: check which column or array holds the labels, and add examples of another class (if "
        "validation_fraction took all of them, lower it or change the seed)"
    )


def _kind(raw: RawArray) -> str:
    if raw.values.dtype.kind not in KIND_OF_DTYPE:
        raise DataError(
            f"{raw.name} has dtype {shown(str(raw.values.dtype))}; expected integers, floats, bools or text: "
            "convert it first"
        )
    return KIND_OF_DTYPE[raw.values.dtype.kind]


def _check_kinds(parts: Sequence[RawArray], kinds: Sequence[str], loss: LossName | None) -> None:
    alike = kinds if loss is None else ["text" if kind == "text" else "numbers" for kind in kinds]
    if len(set(alike)) > 1:
        raise DataError(
            f"{parts[1].name} holds {kinds[1]}, but {parts[0].name} holds {kinds[0]}; give both the same dtype"
        )


def _check_targets(raw: RawArray, kind: str, names: Classes | None) -> None:
    """Refuse named classes as targets of a regression: the numbers of classes are arbitrary."""
    words = names if names and not all(map(str.isdecimal, names)) else ()
    if kind == "text":
        words = tuple(dict.fromkeys(_texts(RawArray(raw.name, _one_per_example(raw)[:3]))))
    if words:
        named = ", ".join(shown(word[:60]) for word in words[:3])
        raise DataError(
            f"{raw.name} holds classes named {named}; loss 'mse' expects numbers: use `loss: "
            "cross_entropy`, or give the labels as numbers"
        )


def _all_targets(parts: Sequence[RawArray]) -> list[NDArray[Any]]:
    targets: list[NDArray[Any]] = [_targets(part) for part in parts]
    for raw, values in zip(parts, targets, strict=True):
        if values.shape[1] != targets[0].shape[1]:
            raise DataError(
                f"{raw.name} has {counted(values.shape[1], 'target')} per example, but {parts[0].name} has "
                f"{targets[0].shape[1]}; give both parts the same number"
            )
    return targets


def _targets(raw: RawArray) -> FloatArray:
    values = raw.values[:, np.newaxis] if raw.values.ndim == 1 else raw.values
    if values.ndim != 2 or values.shape[1] == 0:
        raise DataError(f"{raw.name} has shape {raw.values.shape}; expected [examples] or [examples, targets]")
    with np.errstate(over="ignore"):  # an overflow gives an infinity, which is refused below
        targets = np.ascontiguousarray(values, np.float32)
    check_finite(raw.name, targets)
    return targets


def _one_per_example(raw: RawArray) -> NDArray[Any]:
    values = raw.values
    if values.ndim == 2 and values.shape[1] == 1:
        return values[:, 0]
    if values.ndim != 1:
        raise DataError(
            f"{raw.name} has dtype {shown(str(values.dtype))} and shape {values.shape}; expected one class per "
            "example, in shape [examples]. For several targets per example use `loss: mse`, or floats for a model with "
            "its own loss"
        )
    return values


def _text_classes(parts: Sequence[RawArray], loss: LossName | None) -> tuple[list[NDArray[Any]], Classes]:
    texts = [_texts(part) for part in parts]
    classes = tuple(sorted(set(texts[0])))
    if loss == "binary_cross_entropy" and len(classes) > 2:
        raise _too_many_classes(parts[0], classes)
    if len(classes) > MAX_CLASSES:
        raise DataError(
            f"{parts[0].name} has {len(classes):,} different texts; at most {MAX_CLASSES:,} classes are expected: "
            f"check which column or array holds the labels; {REGRESSION_HINT}"
        )
    codes = {name: code for code, name in enumerate(classes)}
    return [_encode_texts(part, labels, codes) for part, labels in zip(parts, texts, strict=True)], classes


def _texts(raw: RawArray) -> list[str]:
    try:
        texts: list[str] = _one_per_example(raw).tolist()
        for text in set(texts):
            text.encode()
    except DataError:
        raise
    except (ValueError, SystemError) as error:
        raise DataError(f"{raw.name} holds text that is not valid Unicode; write the labels again") from error
    return texts


def _encode_texts(raw: RawArray, texts: Sequence[str], codes: dict[str, int]) -> Codes:
    try:
        return np.array([codes[text] for text in texts], np.int64)
    except KeyError:
        row = next(row for row, text in enumerate(texts) if text not in codes)
        raise _unknown_class(raw, row, quoted(texts[row]), list(codes)) from None


def _number_classes(
    parts: Sequence[RawArray], loss: LossName | None, names: Classes | None
) -> tuple[list[NDArray[Any]], Classes]:
    values = [_whole_numbers(part, loss) for part in parts]
    if loss == "cross_entropy" and parts[0].values.dtype.kind == "f":
        _check_at_most_two(parts[0], np.unique(values[0]))
    numbers = np.arange(len(names)) if names else _class_numbers(parts[0], values[0], loss)
    if loss == "binary_cross_entropy" and len(numbers) > 2:
        raise _too_many_classes(parts[0], names or numbers.tolist())
    classes = names or tuple(str(number) for number in numbers.tolist())
    return [_encode(part, whole, numbers) for part, whole in zip(parts, values, strict=True)], classes


def _whole_numbers(raw: RawArray, loss: LossName | None) -> NDArray[Any]:
    values = _one_per_example(raw)
    if values.dtype.kind != "f":
        return values.astype(np.uint8) if values.dtype.kind == "b" else values
    values = values.astype(np.float64)
    wrong = np.flatnonzero(~(np.abs(values) <= MAX_WHOLE) | (values != np.floor(values)))  # True for NaN
    if len(wrong):
        raise DataError(
            f"{raw.name}: row {wrong[0]} (from 0) has label {values[wrong[0]]}; loss {loss!r} expects classes, "
            f"which are whole numbers from 0, or text; {REGRESSION_HINT}"
        )
    return values.astype(np.int64)


def _check_at_most_two(raw: RawArray, distinct: NDArray[Any]) -> None:
    if len(distinct) > 2:
        raise DataError(
            f"{raw.name} has {len(distinct)} different floats ({_listed(distinct.astype(float).tolist())}); loss "
            "'cross_entropy' expects classes: store them as integers (in a CSV file: 3 instead of 3.0), or as text; "
            f"{REGRESSION_HINT}"
        )


def _class_numbers(raw: RawArray, values: NDArray[Any], loss: LossName | None) -> NDArray[Any]:
    """Return the original label of each class, sorted."""
    low = int(values.min())
    high = int(values.max())
    if loss == "binary_cross_entropy":
        return np.arange(2) if low >= 0 and high <= 1 else np.unique(values)
    if low >= 0 and high < MAX_CLASSES:
        return np.arange(high + 1)
    distinct = np.unique(values)
    if loss is None or len(distinct) > 2:
        raise _not_numbered(raw, values, loss)
    return distinct


def _encode(raw: RawArray, values: NDArray[Any], classes: NDArray[Any]) -> Codes:
    codes = np.minimum(np.searchsorted(classes, values), len(classes) - 1)
    wrong = np.flatnonzero(classes[codes] != values)
    if len(wrong):
        raise _unknown_class(raw, int(wrong[0]), repr(values[wrong[0]].item()), classes.tolist())
    return codes.astype(np.int64)


def _unknown_class(raw: RawArray, row: int, label: str, classes: Sequence[Any]) -> DataError:
    return DataError(
        f"{raw.name}: row {row} (from 0) has label {label}, which is not among the training classes "
        f"({_listed(classes)}): correct the label, drop the row, or add examples of this class to the training part"
    )


def _too_many_classes(raw: RawArray, classes: Sequence[Any]) -> DataError:
    return DataError(
        f"{raw.name} has {len(classes)} different labels ({_listed(classes)}); loss 'binary_cross_entropy' expects "
        f"two: use `loss: cross_entropy`, or {REGRESSION_HINT}"
    )


def _not_numbered(raw: RawArray, values: NDArray[Any], loss: LossName | None) -> DataError:
    row = int(np.flatnonzero((values < 0) | (values >= MAX_CLASSES))[0])
    return DataError(
        f"{raw.name}: row {row} (from 0) has label {values[row]}; expected classes numbered from 0 to "
        f"at most {MAX_CLASSES - 1}{', or two different values' if loss else ''}: number the classes from 0, or write "
        f"them as text; {REGRESSION_HINT if loss else OWN_LOSS_HINT}"
    )


def _listed(classes: Sequence[Any]) -> str:
    first = [shown(str(label)[:60]) for label in classes[:4]]
    return ", ".join(first) if len(classes) <= 4 else f"{', '.join(first[:2])}, ..., {shown(str(classes[-1])[:60])}"
