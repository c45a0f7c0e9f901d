"""Labels in the form that a loss needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psgd_workers.data.examples import Dataset, Examples
from psgd_workers.errors import DataError
from psgd_workers.spec import LossName, ModelSpec, PythonModel

__all__ = ["fit_labels", "num_outputs"]

Labels = NDArray[Any]


def fit_labels(spec: ModelSpec, dataset: Dataset) -> Dataset:
    """The dataset with its labels as the model's loss reads them.

    | loss | labels |
    |---|---|
    | `cross_entropy` | `[examples]` int64, numbers of classes |
    | `binary_cross_entropy` | `[examples]` int64, 0 or 1 |
    | `mse` | `[examples, targets]` float32; of classes, the numbers that name them |

    A model of the user's own has its loss inside, so its labels are left as they are.

    Raises:
        DataError: the labels, training or validation, do not fit the loss.
    """
    if isinstance(spec, PythonModel):
        return dataset
    fit = _FITS[spec.loss]

    def fitted(part: str, examples: Examples) -> Examples:
        try:
            return replace(examples, labels=fit(examples.labels, dataset.classes))
        except DataError as error:
            raise DataError(f"the {part} labels do not fit loss {spec.loss!r}: {error}") from None

    return replace(
        dataset,
        train=fitted("training", dataset.train),
        validation=None if dataset.validation is None else fitted("validation", dataset.validation),
        classes=None if spec.loss == "mse" else dataset.classes,
    )


def num_outputs(loss: LossName, dataset: Dataset) -> int:
    """How many outputs a model needs for a dataset that `fit_labels` returned."""
    if loss == "cross_entropy":
        assert dataset.classes is not None, "fit_labels refuses these"
        return len(dataset.classes)
    return 1 if loss == "binary_cross_entropy" else dataset.train.labels.shape[1]


def _as_classes(labels: Labels, classes: tuple[str, ...] | None) -> Labels:
    if classes is None:
        raise DataError(
            f"they are numbers ({labels.dtype} {list(labels.shape)}), not classes. For a regression use loss 'mse'"
        )
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"they are {labels.dtype} {list(labels.shape)}; expected one integer per example")
    if labels.min(initial=0) < 0 or labels.max(initial=0) >= len(classes):
        raise DataError(f"they run from {labels.min()} to {labels.max()}, but there are {len(classes)} classes")
    return labels.astype(np.int64, copy=False)


def _as_binary(labels: Labels, classes: tuple[str, ...] | None) -> Labels:
    if labels.size != len(labels):
        raise DataError(f"their shape is {list(labels.shape)}; expected one label per example")
    if not np.isin(labels, (0, 1)).all():
        found = f"{len(classes)} classes" if classes else f"numbers from {labels.min()} to {labels.max()}"
        raise DataError(f"expected nothing but 0 and 1, found {found}. For classes use loss 'cross_entropy'")
    return labels.reshape(-1).astype(np.int64, copy=False)


def _as_targets(labels: Labels, classes: tuple[str, ...] | None) -> Labels:
    if classes is not None:
        labels = _named_numbers(classes)[_as_classes(labels, classes)]
    if labels.ndim not in (1, 2) or labels.dtype.kind not in "biuf":
        raise DataError(
            f"they are {labels.dtype} {list(labels.shape)}; expected numbers, [examples] or [examples, targets]"
        )
    if not np.isfinite(labels).all():
        raise DataError("some are infinite or not a number; expected finite numbers")
    return labels.reshape(len(labels), -1).astype(np.float32, copy=False)


def _named_numbers(classes: tuple[str, ...]) -> Labels:
    try:
        return np.array([float(name) for name in classes])
    except ValueError:
        raise DataError(
            f"they are classes named {', '.join(classes[:3])}, not numbers. Use loss 'cross_entropy'"
        ) from None


_FITS: Mapping[LossName, Callable[[Labels, tuple[str, ...] | None], Labels]] = {
    "binary_cross_entropy": _as_binary,
    "cross_entropy": _as_classes,
    "mse": _as_targets,
}
