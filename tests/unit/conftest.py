from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.jobs import job
from tests.support.server_harness import Harnesses, ServerHarness


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
