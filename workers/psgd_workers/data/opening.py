"""The way from a `DataSpec` to a `Dataset`: read, check, encode, split, normalise, fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import assert_never

from psgd_workers.data.examples import Dataset, Examples, Features
from psgd_workers.data.features import row_features
from psgd_workers.data.formats.csv import read_csv
from psgd_workers.data.formats.npz import read_npz
from psgd_workers.data.formats.sklearn import read_sklearn
from psgd_workers.data.labels import check_two_classes, encode_labels
from psgd_workers.data.normalize import normalize
from psgd_workers.data.raw import RawData, RawPart
from psgd_workers.data.split import split_validation
from psgd_workers.errors import DataError
from psgd_workers.spec import CsvData, DataSpec, LossName, NpzData, SklearnData

__all__ = ["open_dataset"]


def open_dataset(spec: DataSpec, seed: int, loss: LossName | None = None) -> Dataset:
    """Read the data of a job and make it ready to be trained on.

    The classes are those of the training part as the file has it, before `validation_fraction` is set aside: the size
    of a model does not depend on the seed.

    Args:
        spec: what to read, and how.
        seed: of the job, not negative; it decides which examples a `validation_fraction` takes.
        loss: loss of the model, which decides what the labels mean; None for a model that has its own.

    Raises:
        DataError: the data is missing, malformed, does not fit the loss, or cannot be split as asked.
        MissingExtraError: the format needs a package that is not installed.
    """
    raw = _read(spec)
    features = _features(raw.parts)
    labels, classes = encode_labels([part.labels for part in raw.parts], loss, raw.classes)
    parts = tuple(Examples(*pair) for pair in zip(features, labels, strict=True))
    if spec.validation_fraction is not None:
        parts = split_validation(parts[0], spec.validation_fraction, seed)
    check_two_classes(raw.parts[0].labels.name, parts[0].labels, classes, loss)
    fingerprint = _fingerprint(parts, classes, spec.normalize)
    parts = normalize(spec.normalize, *parts)
    return Dataset(parts[0], parts[1] if len(parts) > 1 else None, classes, fingerprint)


def _read(spec: DataSpec) -> RawData:
    match spec:
        case NpzData():
            return read_npz(spec)
        case CsvData():
            return read_csv(spec)
        case SklearnData():
            return read_sklearn(spec)
        case _:
            assert_never(spec)


def _features(parts: Sequence[RawPart]) -> list[Features]:
    for part in parts:
        _check_lengths(part)
    features = [row_features(part.features) for part in parts]
    for part, values in zip(parts, features, strict=True):
        if values.shape[1:] != features[0].shape[1:]:
            raise DataError(
                f"{part.features.name} has examples of shape {values.shape[1:]}, but {parts[0].features.name} of "
                f"{features[0].shape[1:]}; give both parts the same"
            )
    return features


def _check_lengths(part: RawPart) -> None:
    features = part.features.values.shape
    labels = part.labels.values.shape
    if features[:1] != labels[:1]:
        raise DataError(
            f"{part.features.name} has shape {features}, but {part.labels.name} {labels}; expected a label per example"
        )


def _fingerprint(parts: Sequence[Examples], classes: tuple[str, ...] | None, normalization: str) -> str:
    """Hash the content before it is normalised: sums in float64 may differ in their last bits between processors."""
    digest = hashlib.sha256(json.dumps([classes, normalization]).encode())
    for part in parts:
        for values in (part.features, part.labels):
            digest.update(f"{values.dtype.str}{values.shape}".encode())
            digest.update(values.data)
    return digest.hexdigest()
