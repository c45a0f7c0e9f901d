from __future__ import annotations

import numpy as np
import pytest

from psgd_workers.data import Examples, memory, opening
from psgd_workers.data.features import row_features
from psgd_workers.data.memory import check_memory
from psgd_workers.data.normalize import normalize
from psgd_workers.data.raw import RawArray
from psgd_workers.data.split import split_validation
from psgd_workers.errors import DataError
from psgd_workers.spec import SklearnData

MIB = 2**20


@pytest.fixture(autouse=True)
def _a_mebibyte_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: MIB)


def test_data_that_does_not_fit_is_refused_with_both_sizes() -> None:
    check_memory("x", MIB)
    with pytest.raises(DataError, match="x needs 3 MiB of memory, but 1 MiB are free here: use a machine with more"):
        check_memory("x", 3 * MIB)


def test_features_are_not_converted_if_their_copy_does_not_fit() -> None:
    assert row_features(RawArray("x", np.zeros(MIB, np.uint8))).dtype == np.uint8
    with pytest.raises(DataError, match="x needs 4 MiB of memory"):
        row_features(RawArray("x", np.zeros(MIB, np.int8)))


def test_bytes_are_not_normalised_to_floats_that_do_not_fit() -> None:
    examples = Examples(np.zeros((MIB, 1), np.uint8), np.zeros(MIB, np.int64))
    assert normalize("unit", examples)[0].features.dtype == np.uint8
    with pytest.raises(DataError, match="the normalised copy of the features needs 4 MiB of memory"):
        normalize("standardize", examples)


def test_a_validation_part_is_not_split_off_if_the_copies_do_not_fit() -> None:
    examples = Examples(np.zeros((MIB, 1), np.uint8), np.zeros(MIB, np.int64))
    with pytest.raises(DataError, match="the data, split into two parts, needs 9 MiB of memory"):
        split_validation(examples, 0.5, 0)


def test_an_allocation_that_fails_is_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(opening, "read_sklearn", out_of_memory)
    with pytest.raises(DataError, match="data of format sklearn needs more memory than is free here: use a machine"):
        opening.open_dataset(SklearnData(format="sklearn", dataset="iris"), 0)
