from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.partitions import Partition
from psgd.serving.server_lock import ServerLock
from psgd_workers.messages import EpochGrid, Version
from psgd_workers.transport.memory import PublishedVector, has_shared_memory
from tests.support.jobs import job
from tests.support.server_harness import IS_COMPILED

if not IS_COMPILED:
    pytest.skip("the push path is not compiled", allow_module_level=True)

from numba import typeof

from psgd.serving.compiled.arrays import server_arrays


def type_of_arrays(published: PublishedVector | None = None, **sections: Any) -> Any:
    start = np.zeros(3, np.float32)
    server = ParameterServer(
        job(**sections), Partition(0, 0, 3, 3), start, EpochGrid((9,), 9), Version(1, 0), published
    )
    lock = ServerLock()
    return typeof(server_arrays(server, lock.mutex, lock.fault))


@pytest.mark.parametrize(
    "sections",
    [
        {"scaling": {"servers": 2}},
        {"scaling": {"servers": 3}, "workers": 4},
        {"optimizer": {"name": "adam", "lr": 0.1, "ema": 0.9}},
        {"optimizer": {"lr": 0.1, "momentum": 0.9, "max_grad_norm": 1.0}},
        {"correction": {"name": "rescaled"}},
    ],
    ids=str,
)
def test_the_code_on_disk_is_that_of_every_job(sections: dict[str, Any]) -> None:
    """Code is kept by the types of its arguments, and the process that compiles has one job only."""
    assert type_of_arrays(**sections) == type_of_arrays()


@pytest.mark.skipif(not has_shared_memory(), reason="needs Linux' anonymous shared memory")
def test_shared_weights_need_no_other_code() -> None:
    published = PublishedVector(3)
    try:
        assert type_of_arrays(published) == type_of_arrays()
    finally:
        published.close()
