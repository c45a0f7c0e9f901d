"""What several of these tests share."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from psgd_workers.datasets import Dataset, Examples, open_dataset
from psgd_workers.spec import NpzData

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def mnist() -> Dataset:
    data = Path(os.environ.get("PSGD_TEST_DATA", REPOSITORY / "../shared/data"))
    return open_dataset(NpzData(format="npz", path=str(data / "mnist.npz"), normalize="unit"), seed=0)


@pytest.fixture
def numbered() -> Examples:
    """20 examples that hold their own row number."""
    rows = np.arange(20)
    return Examples(np.repeat(rows, 3).reshape(20, 3).astype(np.float32), rows)
