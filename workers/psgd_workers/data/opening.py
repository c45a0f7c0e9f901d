"""Opens the data of a job: reads, checks, encodes, splits, fingerprints and normalises it."""

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
from psgd_workers.data.memory import too_large
from psgd_workers.data.normalize import normalize
from psgd_workers.data.raw import RawData, RawPart
from psgd_workers.data.split import split_validation
from psgd_workers.errors import DataError
from psgd_workers.spec import CsvData, DataSpec, LossName, NpzData, SklearnData

__all__ = ["open_dataset"]


def open_dataset(spec: DataSpec, seed: int, loss: LossName | None = None) -> Dataset:
    """Read the data of a job and prepare it for training.

    The classes are determined before `validation_fraction` splits the training part, so that the size of a model does
    not depend on the seed.

    Args:
        spec: `data` section of the job.
        seed: seed of the job, not negative. It determines the examples that `validation_fraction` takes.
        loss: loss of the model, which determines how labels are encoded. None for a model with a loss of its own.

    Returns:
        The data set.

    Raises:
        DataError: the data is missing, malformed, does not fit the loss, or cannot be split as asked.
        MissingExtraError: reading the format needs a package that is not installed.
    """
    try:
        return _opened(spec, seed, loss)
    except MemoryError as error:
        raise too_large(f"data of format {spec.format}", "more memory than is free here") from error


def _opened(spec: DataSpec, seed: int, loss: LossName | None) -> Dataset:
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
                f"{part.features.name} has examples of shape {values.shape[1:]}, but {parts[0].features.name} has "
                f"examples of shape {features[0].shape[1:]}; give both parts the same shape"
            )
    return features


def _check_lengths(part: RawPart) -> None:
    features = part.features.values.shape
    labels = part.labels.values.shape
    if features[:1] != labels[:1]:
        raise DataError(
            f"{part.features.name} has shape {features}, but {part.labels.name} has shape {labels}; "
            "expected one label per example"
        )


def _fingerprint(parts: Sequence[Examples], classes: tuple[str, ...] | None, normalization: str) -> str:
    """Hash the data before normalisation, whose float64 sums may differ in their last bits between processors."""
    digest = hashlib.sha256(json.dumps([classes, normalization]).encode())
    for part in parts:
        for values in (part.features, part.labels):
            digest.update(f"{values.dtype.str}{values.shape}".encode())
            digest.update(values.data)
    return digest.hexdigest()
