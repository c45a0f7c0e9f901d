from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.partitions import Partition
from psgd.serving.compiled.loading import load_path
from psgd.serving.server_lock import ServerLock
from psgd_workers.messages import EpochGrid, Version
from tests.support.jobs import job
from tests.support.server_harness import IS_COMPILED, Harnesses, ServerHarness


@pytest.fixture(scope="session")
def compiled_code() -> None:
    """Compile the push path before the first test that needs it, whose time limits are not meant for that."""
    if not IS_COMPILED:
        return
    server = ParameterServer(job(), Partition(0, 0, 1, 1), np.zeros(1, np.float32), EpochGrid((1,), 1), Version(1, 0))
    assert load_path(server, ServerLock()) is not None


@pytest.fixture
def harnesses(compiled_code: None) -> Iterator[Harnesses]:
    """Return a function that starts a server. After the test, check that no thread and no uncaught error is left."""
    opened: list[ServerHarness] = []

    def harness(mode: str = "async", workers: int = 1, sections: Any = None, **options: Any) -> ServerHarness:
        opened.append(ServerHarness(job(mode, workers, **(sections or {})), **options))
        return opened[-1]

    before = threading.active_count()
    yield harness
    for each in opened:
        each.close()
    assert [each.errors for each in opened] == [[]] * len(opened)
    assert threading.active_count() == before
