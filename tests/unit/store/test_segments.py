from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from psgd.core.server.journal import RECORD, RecordKind, record_type
from psgd.errors import JournalError
from psgd.store.segments import parse_segment


def saved(records: NDArray[Any]) -> bytes:
    file = BytesIO()
    np.save(file, records, allow_pickle=False)
    return file.getvalue()


@pytest.mark.parametrize("partitions", [1, 2, 5, 100])
@pytest.mark.parametrize("number", [0, 1, 1234])
def test_records_are_read_as_they_were_written(partitions: int, number: int) -> None:
    records = np.zeros(number, record_type(partitions))
    records["updates"] = np.arange(number)
    for given in (partitions, None):
        found = parse_segment(saved(records), "x.npy", given)
        assert found.dtype == records.dtype
        assert found.tobytes() == records.tobytes()


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "damaged"),
        (b"\x93NUMPY", "does not know"),
        (b"\x93NUMPY\x01\x00\xff\xff{", "does not know"),
        (b"\x93NUMPY\x01\x00\x06\x00" + b"(" * 6, "does not know"),
        (saved(np.zeros(3, RECORD))[:-1], "damaged"),
        (saved(np.zeros(3, RECORD)) + b"\x00", "damaged"),
        (saved(np.zeros(3, RECORD)).replace(b"(3,)", b"(9,)"), "does not know"),
        (saved(np.zeros((3, 1), RECORD)), "does not know"),
        (saved(np.zeros(3)), "does not know"),
        (saved(np.full(1, RecordKind.SKIP + 1, RECORD)), "does not know"),
        (saved(np.array([(0, 0, b"\xff", *[0] * 14)], RECORD)), "a worker has a name that is not text"),
    ],
)
def test_another_file_is_refused(data: bytes, fault: str) -> None:
    with pytest.raises(JournalError, match=rf"journal/x\.npy .*{fault}"):
        parse_segment(data, "journal/x.npy")


def test_records_of_another_number_of_partitions_are_refused() -> None:
    with pytest.raises(JournalError, match="does not know"):
        parse_segment(saved(np.zeros(3, record_type(2))), "x.npy", 3)
