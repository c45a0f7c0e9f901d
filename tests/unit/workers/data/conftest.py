"""Fixtures for the tests of data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from psgd_workers.data import Dataset, Examples, open_dataset
from psgd_workers.spec import NpzData


@pytest.fixture(scope="session")
def mnist(mnist_file: Path) -> Dataset:
    return open_dataset(NpzData(format="npz", path=str(mnist_file), normalize="unit"), seed=0)


@pytest.fixture
def numbered() -> Examples:
    """20 examples whose feature is their own row number."""
    rows = np.arange(20)
    return Examples(np.repeat(rows, 3).reshape(20, 3).astype(np.float32), rows)
