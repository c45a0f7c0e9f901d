"""NumPy `.npz` archives. Nothing is ever unpickled."""

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
DAMAGE = (EOFError, ValueError, zipfile.BadZipFile, zlib.error)  # NumPy's ValueError may also be a refused pickle


def read_npz(spec: NpzData) -> RawData:
    """The training part, and the validation part that the spec names or that goes by Keras' names.

    Raises:
        DataError: the file cannot be read, is no archive, or lacks an array.
    """
    with open_file(spec.path) as remote:
        file = io.BytesIO(remote.read())  # reading an archive takes seeking, which some web servers do not offer
    with _archive(file, spec.path) as archive:
        keys = [(spec.features, spec.labels), *_validation_keys(spec, archive)]
        return RawData(tuple(RawPart(*(_array(archive, spec.path, key) for key in pair)) for pair in keys))


def _archive(file: io.BytesIO, path: str) -> NpzFile:
    try:
        archive: NpzFile | NDArray[Any] = np.load(file, allow_pickle=False)
    except DAMAGE as error:
        raise DataError(f"{path} is not an .npz file; write one with numpy.savez_compressed") from error
    if not isinstance(archive, NpzFile):
        raise DataError(f"{path} is not an .npz file but one array (.npy); write one with numpy.savez_compressed")
    return archive


def _validation_keys(spec: NpzData, archive: NpzFile) -> list[tuple[str, str]]:
    if spec.validation_features is not None and spec.validation_labels is not None:
        return [(spec.validation_features, spec.validation_labels)]
    if spec.validation_fraction is None and set(KERAS_VALIDATION) <= set(archive.files):
        return [KERAS_VALIDATION]
    return []


def _array(archive: NpzFile, path: str, key: str) -> RawArray:
    if key not in archive.files:
        raise DataError(f"{path} has no array {key!r}; it has {', '.join(archive.files) or 'none'}: name one of them")
    try:
        values: NDArray[Any] | bytes = archive[key]
    except DAMAGE as error:
        raise DataError(f"{path}: {key} cannot be read: {error}; save it as a plain array of numbers") from error
    if isinstance(values, bytes):  # NumPy's answer for a member that is no array
        raise DataError(f"{path}: {key} is not an array; write the file with numpy.savez_compressed")
    return RawArray(f"{path}: {key}", values)
