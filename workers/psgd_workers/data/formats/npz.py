"""Reads NumPy `.npz` archives, which are zip files of arrays, from any source.

An array is read only if its header declares as many bytes as the archive does, and if they fit into memory. So a small
file cannot ask for much memory, and the checksum of every array is compared. Pickled objects are refused, because
loading them runs code from the file.
"""

from __future__ import annotations

import io
import math
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from psgd_workers.data.file import read_file
from psgd_workers.data.memory import check_memory
from psgd_workers.data.raw import RawArray, RawData, RawPart
from psgd_workers.errors import DataError
from psgd_workers.quoting import quoted, shown
from psgd_workers.spec import NpzData

__all__ = ["read_npz"]

KERAS_VALIDATION = ("x_test", "y_test")
MAX_LISTED = 10  # names of arrays in a message
ENTRY = b"PK\1\2"  # begins the entry of a member in the list at the end of a zip file
MAX_MEMBERS = 10_000
END = b"PK\5\6"  # begins the record at the end of a zip file, in which bytes 10 and 11 are the number of members
MAX_END = 22 + 0xFFFF  # largest size of that record
MANY = 0xFFFF  # number of members in that record if it does not fit there
ENCRYPTED = 0x1  # flag of a member of a zip file
# Compressions of NumPy. Others unpack a piece of any size at once: 4 KiB of bzip2 can become gigabytes.
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
DAMAGES = (zipfile.BadZipFile, zlib.error, EOFError)
HEADERS: dict[tuple[int, int], Callable[[IO[bytes]], tuple[tuple[int, ...], bool, np.dtype[Any]]]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class Member(NamedTuple):
    """An array of an archive, not read yet."""

    name: str  # for messages
    info: zipfile.ZipInfo
    size: int  # bytes of its values


def read_npz(spec: NpzData) -> RawData:
    """Read the training part, and the validation part if the spec or Keras' names (`x_test`, `y_test`) give one.

    Raises:
        DataError: the file cannot be read, is not an archive, or lacks an array; or an array is damaged or too large.
    """
    path = shown(spec.path)
    with _archive(read_file(spec.path), path) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about arrays that Python 2 wrote
        members = _members(archive, path)
        keys = [(spec.features, spec.labels), *_validation_keys(spec, members)]
        pairs = [[_member(archive, members, path, key) for key in pair] for pair in keys]
        check_memory(path, sum(member.size for pair in pairs for member in pair))
        return RawData(tuple(RawPart(*(_array(archive, member) for member in pair)) for pair in pairs))


def _archive(content: io.BytesIO, path: str) -> zipfile.ZipFile:
    if bytes(content.getbuffer()[:6]) == np.lib.format.MAGIC_PREFIX:
        raise DataError(
            f"{path} is not an .npz file but one array (.npy); write an archive with numpy.savez_compressed"
        )
    if content.getvalue().count(ENTRY) > MAX_MEMBERS:  # zipfile would take a kilobyte for each
        raise DataError(f"{path} lists more than {MAX_MEMBERS:,} arrays: write only those that the job names")
    try:
        archive = zipfile.ZipFile(content)
    except Exception as error:  # zipfile checks little of a damaged archive, and raises errors of many types
        raise DataError(f"{path} is not an .npz file; write one with numpy.savez_compressed") from error
    ending = bytes(content.getbuffer()[-MAX_END:])
    announced = int.from_bytes(ending[ending.rindex(END) + 10 :][:2], "little")
    listed = len(archive.infolist())
    if announced not in (listed & MANY, MANY):  # a damaged entry may hide the ones behind it
        raise DataError(
            f"{path} is damaged: it announces {announced} arrays, but lists {listed}; write it again with "
            "numpy.savez_compressed"
        )
    return archive


def _members(archive: zipfile.ZipFile, path: str) -> dict[str, list[zipfile.ZipInfo]]:
    """Return the members by the name of their array. Several members may have the same name.

    Each name stands in the archive twice. A damaged copy is refused, because an array could be missed unnoticed.
    """
    members: dict[str, list[zipfile.ZipInfo]] = {}
    for info in archive.infolist():
        if not info.flag_bits & ENCRYPTED and info.compress_type in COMPRESSIONS:
            _open(archive, info, f"{path}: {shown(info.filename[:60])}").close()
        members.setdefault(info.filename.removesuffix(".npy"), []).append(info)
    return members


def _validation_keys(spec: NpzData, members: dict[str, list[zipfile.ZipInfo]]) -> list[tuple[str, str]]:
    if spec.validation_features is not None and spec.validation_labels is not None:
        return [(spec.validation_features, spec.validation_labels)]
    if spec.validation_fraction is None and set(KERAS_VALIDATION) <= set(members):
        return [KERAS_VALIDATION]
    return []


def _member(archive: zipfile.ZipFile, members: dict[str, list[zipfile.ZipInfo]], path: str, key: str) -> Member:
    if key not in members:
        raise DataError(f"{path} has no array {quoted(key)}; its arrays are {_listed(list(members))}: name one of them")
    name = f"{path}: {shown(key)}"
    info, *others = members[key]
    if others:
        raise DataError(f"{name} is in the archive {len(others) + 1} times; write each array once")
    if info.flag_bits & ENCRYPTED:
        raise DataError(f"{name} is encrypted; write the file without a password, with numpy.savez_compressed")
    if info.compress_type not in COMPRESSIONS:
        raise DataError(
            f"{name} has the compression method {info.compress_type}, which NumPy does not write; write the file with "
            "numpy.savez_compressed"
        )
    with _open(archive, info, name) as file:
        return Member(name, info, _checked_size(file, info, name))


def _checked_size(file: IO[bytes], info: zipfile.ZipInfo, name: str) -> int:
    """Return the bytes of an array's values. Refuse an array whose header does not fit the archive."""
    try:
        version = np.lib.format.read_magic(file)
    except ValueError as error:
        raise DataError(f"{name} is not an array; write the file with numpy.savez_compressed") from error
    except DAMAGES as error:
        raise _unreadable(name, str(error)) from error
    try:
        shape, _, dtype = HEADERS[version](file)
    except DAMAGES as error:
        raise _unreadable(name, str(error)) from error
    except Exception as error:  # NumPy evaluates the header as Python text, which may raise anything
        raise _unreadable(name, "its header is damaged, or declares a structured dtype") from error
    if dtype.hasobject:
        raise _unreadable(name, "Object arrays are refused, because loading them runs code from the file")
    declared = dtype.itemsize * math.prod(shape)
    stored = info.file_size - file.tell()
    if declared != stored or min(shape, default=0) < 0:
        raise _unreadable(
            name, f"its header declares {declared:,} bytes of values, but the archive has {stored:,} bytes of them"
        )
    return stored


def _array(archive: zipfile.ZipFile, member: Member) -> RawArray:
    with _open(archive, member.info, member.name) as file:
        try:
            values: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
        except Exception as error:  # of zipfile, zlib or NumPy, or MemoryError
            raise _unreadable(member.name, shown(str(error)) or type(error).__name__) from error
    return RawArray(member.name, values)


def _open(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> IO[bytes]:
    try:
        return archive.open(info)
    except Exception as error:  # zipfile raises errors of many types
        raise _unreadable(name, shown(str(error)) or type(error).__name__) from error


def _unreadable(name: str, reason: str) -> DataError:
    return DataError(f"{name} cannot be read: {reason}; save it again as an array of numbers")


def _listed(names: Sequence[str]) -> str:
    listed = ", ".join(shown(name[:60]) for name in names[:MAX_LISTED]) or "none"
    return f"{listed}, and {len(names) - MAX_LISTED:,} more" if len(names) > MAX_LISTED else listed
