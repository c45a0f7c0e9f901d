"""Pushes from the server's own process: compiled code gives the same receipts and the same bits as the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.partitions import Partition
from psgd_workers.messages import BatchId, EpochGrid, Gradient, Version
from tests.support.jobs import job, push
from tests.support.server_harness import IS_COMPILED

if not IS_COMPILED:
    pytest.skip("the push path is not compiled", allow_module_level=True)

from psgd.serving.compiled.direct import DirectPath

SIZE = 6
GRID = EpochGrid((40,), 40)
START = np.linspace(-1, 1, SIZE, dtype=np.float32)
V0 = Version(1, 0)


def server(mode: str = "async", servers: int = 1, **sections: Any) -> ParameterServer:
    spec = job(mode, 3, scaling={"servers": servers}, **sections)
    made = ParameterServer(spec, Partition(0, 0, SIZE, SIZE), START, GRID, V0)
    made.join("worker-0", 0.0)
    return made


def gradient(index: int, servers: int = 1) -> Gradient:
    values = np.random.default_rng(index).standard_normal(SIZE, dtype=np.float32)
    one = push(BatchId(0, 0, index), V0, values=values, loss=0.1 * index, number=index + 1)
    return one._replace(others=(Version(1, index),) * (servers - 1))


@pytest.mark.parametrize("servers", [1, 3])
@pytest.mark.parametrize("optimizer", [{"lr": 0.1}, {"name": "adam", "lr": 0.1, "max_grad_norm": 0.5}])
def test_the_usual_case_gives_the_bits_of_the_reference(servers: int, optimizer: dict[str, Any]) -> None:
    fast, reference = (server(servers=servers, optimizer=optimizer) for _ in range(2))
    path = DirectPath(fast)
    for index in range(30):
        if index == 0:  # it begins the epoch
            assert path.push(gradient(0, servers), 0.0) is None
            receipt = fast.push(gradient(0, servers), 0.0)[0]
        else:
            received = path.push(gradient(index, servers), float(index))
            assert received is not None
            receipt = received
        assert (receipt,) == reference.push(gradient(index, servers), float(index))
    for name, array in reference.state().arrays.items():
        np.testing.assert_array_equal(fast.state().arrays[name], array)
    assert fast.state().metadata == reference.state().metadata
    assert fast.journal.take().tobytes() == reference.journal.take().tobytes()


@pytest.mark.parametrize(
    "unusual",
    [
        gradient(0),  # a duplicate
        gradient(1)._replace(worker="worker-1"),  # of a worker without a lease
        gradient(1)._replace(values=np.ones(SIZE)),  # type: ignore[arg-type]  # refused: float64
        gradient(1)._replace(values=np.ones(SIZE - 1, np.float32)),  # refused: too short
        gradient(1)._replace(examples=7),  # refused: the batch has other examples
        gradient(1)._replace(norm=np.inf),
        gradient(1)._replace(batch=BatchId(0, 0, -1)),
        gradient(1)._replace(batch=BatchId(0, 0, -45)),  # before the beginning of the bitmap
        gradient(1)._replace(batch=BatchId(0, -1, 5)),
        gradient(1)._replace(batch=BatchId(-1, 0, 5)),
        gradient(1)._replace(slot=256),
        gradient(1)._replace(slot=-1),
        gradient(1)._replace(number=1 << 70),
        gradient(1)._replace(values=np.ones((SIZE, 1), np.float32)),
        gradient(1)._replace(others=(V0,)),  # of a partition that does not exist
    ],
)
def test_other_pushes_change_nothing_and_are_left_to_the_server(unusual: Gradient) -> None:
    target = server()
    path = DirectPath(target)
    target.push(gradient(0), 0.0)
    before = target.state()
    assert path.push(unusual, 1.0) is None
    after = target.state()
    assert after.metadata == before.metadata
    for name, array in before.arrays.items():
        np.testing.assert_array_equal(after.arrays[name], array)


def test_other_settings_are_read_again() -> None:
    target = server()
    path = DirectPath(target)
    target.push(gradient(0), 0.0)
    target.change(server("bsp").settings, 1.0)
    path.refresh()
    assert path.push(gradient(1), 2.0) is None
