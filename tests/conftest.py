"""Settings and fixtures that all tests share: repeatable random draws, the data, folders and environment for Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.partitions import Partition
from psgd.serving.compiled.loading import load_path
from psgd.serving.server_lock import ServerLock
from psgd_workers.messages import EpochGrid, Version
from tests.benchmarks.mnist import mnist_path
from tests.support.jobs import job
from tests.support.server_harness import IS_COMPILED

# Hypothesis draws the same examples in every run, so that a test fails always or never; `make chaos` draws new ones.
# A draw has no time limit, because machines differ.
settings.register_profile("anew", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("repeatable", settings.get_profile("anew"), derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def compiled_code() -> None:
    """Compile the push path before the first test that needs it, whose time limits are not meant for that."""
    if not IS_COMPILED:
        return
    server = ParameterServer(job(), Partition(0, 0, 1, 1), np.zeros(1, np.float32), EpochGrid((1,), 1), Version(1, 0))
    assert load_path(server, ServerLock()) is not None


@pytest.fixture(scope="session")
def mnist_file() -> Path:
    """Return the path of MNIST in Keras' layout, or skip the test: the file is not part of the repository."""
    if not (file := mnist_path()).exists():
        pytest.skip("mnist.npz was not found: set $PSGD_TEST_DATA to its folder (default: ../shared/data)")
    return file


@pytest.fixture(scope="module")
def ray_home() -> Iterator[Path]:
    """Yield an empty folder for Ray's sessions and token; its path is short, because Unix sockets limit theirs."""
    with TemporaryDirectory(prefix="psgd", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def environment(ray_home: Path) -> dict[str, str]:
    """Return the environment of a command: without the user's Ray token, no usage reports, one BLAS thread."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return inherited | {
        "HOME": str(ray_home),
        "RAY_TMPDIR": str(ray_home),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
