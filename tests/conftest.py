"""Settings that all tests share: repeatable random draws, and clusters with folders and names of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, settings

from tests.benchmarks.mnist import mnist_path

# What is drawn is a function of the test, so that it fails in every run or in none; `make chaos` draws anew. How long a
# draw takes is the machine's matter.
settings.register_profile("anew", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("repeatable", settings.get_profile("anew"), derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def mnist_file() -> Path:
    """MNIST in Keras' layout, which does not come with the repository."""
    if not (file := mnist_path()).exists():
        pytest.skip("mnist.npz is not there: $PSGD_TEST_DATA says where it lies, ../shared/data if it is not set")
    return file


@pytest.fixture(scope="module")
def ray_home() -> Iterator[Path]:
    """A folder for Ray's sessions and for a token that is nobody's; a Unix socket's path must stay short."""
    with TemporaryDirectory(prefix="psgd", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def environment(ray_home: Path) -> dict[str, str]:
    """Return the environment of a command: no token of the user's, no usage reports, one BLAS thread."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return inherited | {
        "HOME": str(ray_home),
        "RAY_TMPDIR": str(ray_home),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
