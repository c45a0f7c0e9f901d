"""A real, local Ray for the tests that ask for one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray


@pytest.fixture(scope="module")
def local_ray(environment: dict[str, str]) -> Iterator[None]:
    """A local Ray without authentication, which `psgd.train` finds and leaves running."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        for name in ("RAY_TMPDIR", "RAY_USAGE_STATS_ENABLED"):
            patch.setenv(name, environment[name])
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
        try:
            yield
        finally:
            ray.shutdown()
