"""A real, local Ray for the tests that ask for one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import ray


@pytest.fixture(scope="session")
def local_ray() -> Iterator[Path]:
    """Start a local Ray without authentication, which `psgd.train` finds and leaves running; yield its folder."""
    with (
        TemporaryDirectory(prefix="psgd", dir="/tmp", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
        try:
            yield Path(folder)
        finally:
            ray.shutdown()
