"""Segments: the files of a run's journal, which `numpy.save` wrote.

The header of a file is compared with the one that psgd writes. NumPy would evaluate it as an expression of Python, with
many ways to fail, and would allocate the memory that it names.
"""

from __future__ import annotations

import re
from io import BytesIO

import numpy as np
from numpy.typing import NDArray

from psgd.core.server.journal import RecordKind, record_type
from psgd.errors import JournalError
from psgd_workers.messages import Outcome

__all__ = ["parse_segment"]

HEADER_BEGIN = 10  # bytes before the header; the last two are its length
OTHERS = re.compile(rb"'others', \[[^\]]{1,100}\], \(([0-9]{1,4}),\)")  # the field of runs with several partitions


def parse_segment(data: bytes, source: str, partitions: int | None = None) -> NDArray[np.void]:
    """Return the records of a segment, of `record_type(partitions)`; they cannot be changed.

    Args:
        data: content of the file.
        source: path or URL of the file, for errors.
        partitions: number of partitions of the run. None: as the file says.

    Raises:
        JournalError: the file is damaged, or was written by another version of psgd.
    """
    end = HEADER_BEGIN + int.from_bytes(data[HEADER_BEGIN - 2 : HEADER_BEGIN], "little")
    header = data[HEADER_BEGIN:end].strip()
    if partitions is None:
        others = OTHERS.search(header)
        partitions = int(others[1]) + 1 if others else 1
    kind = record_type(partitions)
    fields = np.lib.format.dtype_to_descr(kind)
    number, rest = divmod(max(0, len(data) - end), kind.itemsize)
    is_of_kind = f"'descr': {fields!r}".encode() in header
    if not data.startswith(np.lib.format.MAGIC_PREFIX) or (is_of_kind and (rest or not header.endswith(b"}"))):
        raise JournalError(f"{source} is damaged: it is not a file of whole records. Restore the file")
    expected = BytesIO()
    np.lib.format.write_array_header_1_0(expected, {"descr": fields, "fortran_order": False, "shape": (number,)})
    if header != expected.getvalue()[HEADER_BEGIN:].strip():
        raise _unknown(source)
    records = np.frombuffer(data, kind, number, end)
    if (records["kind"] >= len(RecordKind)).any() or (records["outcome"] >= len(Outcome)).any():
        raise _unknown(source)
    if not all(name.isascii() for name in set(records["worker"].tolist())):
        raise JournalError(f"{source} is damaged: a worker has a name that is not text. Restore the file")
    return records


def _unknown(source: str) -> JournalError:
    return JournalError(
        f"{source} has records that this version of psgd does not know: use the version that wrote it (see env.json), "
        "or restore the file"
    )
