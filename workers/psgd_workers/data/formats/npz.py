"""Reads NumPy `.npz` archives. Pickled objects are refused, because loading them runs code from the file."""

from __future__ import annotations

import io
import zipfile
import zlib
from typing import Any

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

from psgd_workers.data.file import open_file
from psgd_workers.data.raw import RawArray, RawData, RawPart
from psgd_workers.errors import DataError
from psgd_workers.spec import NpzData

__all__ = ["read_npz"]

KERAS_VALIDATION = ("x_test", "y_test")
# Errors of a damaged archive. NumPy also raises ValueError to refuse pickled objects.
READ_ERRORS = (EOFError, ValueError, zipfile.BadZipFile, zlib.error)


def read_npz(spec: NpzData) -> RawData:
    """Read the training part, and the validation part if the spec or Keras' names (`x_test`, `y_test`) give one.

    Raises:
        DataError: the file cannot be read, is not an archive, or lacks an array.
    """
    with open_file(spec.path) as source:
        file = io.BytesIO(source.read())  # reading an archive needs seeking, which some web servers do not support
    with _archive(file, spec.path) as archive:
        keys = [(spec.features, spec.labels), *_validation_keys(spec, archive)]
        return RawData(tuple(RawPart(*(_array(archive, spec.path, key) for key in pair)) for pair in keys))


def _archive(file: io.BytesIO, path: str) -> NpzFile:
    try:
        archive: NpzFile | NDArray[Any] = np.load(file, allow_pickle=False)
    except READ_ERRORS as error:
        raise DataError(f"{path} is not an .npz file; write one with numpy.savez_compressed") from error
    if not isinstance(archive, NpzFile):
        raise DataError(
            f"{path} is not an .npz file but one array (.npy); write an archive with numpy.savez_compressed"
        )
    return archive


def _validation_keys(spec: NpzData, archive: NpzFile) -> list[tuple[str, str]]:
    if spec.validation_features is not None and spec.validation_labels is not None:
        return [(spec.validation_features, spec.validation_labels)]
    if spec.validation_fraction is None and set(KERAS_VALIDATION) <= set(archive.files):
        return [KERAS_VALIDATION]
    return []


def _array(archive: NpzFile, path: str, key: str) -> RawArray:
    if key not in archive.files:
        names = ", ".join(archive.files) or "none"
        raise DataError(f"{path} has no array {key!r}; its arrays are {names}: name one of them")
    try:
        values: NDArray[Any] | bytes = archive[key]
    except READ_ERRORS as error:
        raise DataError(f"{path}: {key} cannot be read: {error}; save it again as an array of numbers") from error
    if isinstance(values, bytes):  # NumPy returns bytes for a member that is not an array
        raise DataError(f"{path}: {key} is not an array; write the file with numpy.savez_compressed")
    return RawArray(f"{path}: {key}", values)
