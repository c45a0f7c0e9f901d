from __future__ import annotations

import os

import pytest

from psgd_workers.transport import affinity
from psgd_workers.transport.affinity import NOWHERE, current_processor


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not tell the processor")
def test_it_is_one_that_this_thread_may_run_on() -> None:
    assert current_processor() in os.sched_getaffinity(0)


def test_it_is_nowhere_if_the_system_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    for getcpu in (None, lambda: -1):
        monkeypatch.setattr(affinity, "_getcpu", getcpu)
        assert current_processor() == NOWHERE
