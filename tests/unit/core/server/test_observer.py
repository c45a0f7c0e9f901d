from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from psgd.core.server.observer import ServerObserver
from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.partitions import Partition
from psgd.core.server.state import ServerState
from psgd_workers.messages import BatchId, Gradient, Version
from tests.support.jobs import GRID, START, job, push

WHOLE = Partition(0, 0, len(START), len(START))
V0 = Version(1, 0)


class Told(ServerObserver):
    """An observer that keeps its notifications in order."""

    def __init__(self) -> None:
        self.said: list[tuple[str, Any]] = []

    def started(self, server: ParameterServer) -> None:
        self.said.append(("started", server.version))

    def pushed(self, gradient: Gradient) -> None:
        self.said.append(("pushed", gradient.batch.index))

    def collected(self, gradient: Gradient) -> None:
        self.said.append(("collected", gradient.batch.index))

    def skipped(self, batch: BatchId) -> None:
        self.said.append(("skipped", batch.index))

    def stepped(self, server: ParameterServer) -> None:
        self.said.append(("stepped", server.version.updates))

    def saved(self, server: ParameterServer, state: ServerState) -> None:
        self.said.append(("saved", state.metadata["version"]))

    def restored(self, server: ParameterServer, state: ServerState) -> None:
        self.said.append(("restored", server.version))


def at(index: int) -> BatchId:
    return BatchId(0, 0, index)


def test_an_observer_is_told_everything_in_the_order_of_its_happening() -> None:
    told = Told()
    server = ParameterServer(job(), WHOLE, START, GRID, V0, observer=told)
    server.push(push(at(0), V0), now=1.0)
    server.push(push(at(0), V0), now=1.0)  # a duplicate
    server.skip(at(1), now=1.0)
    server.skip(at(1), now=1.0)  # no-op: it is settled
    server.push(push(at(1), V0), now=1.0)
    state = server.state()
    ParameterServer.restore(job(), GRID, state, incarnation=2, now=2.0, observer=told)
    assert told.said == [
        ("started", V0),
        ("pushed", 0),
        ("collected", 0),
        ("stepped", 1),
        ("pushed", 0),
        ("skipped", 1),
        ("pushed", 1),
        ("saved", [1, 1]),
        ("started", Version(2, 1)),
        ("restored", Version(2, 1)),
    ]


def test_a_gradient_that_is_discarded_is_told_as_done_without() -> None:
    told = Told()
    consistency = {"mode": "ringmaster", "r": 1, "late": "discard"}
    server = ParameterServer(job(consistency=consistency), WHOLE, START, GRID, V0, observer=told)
    for index in range(2):
        server.push(push(at(index), V0), now=1.0)
    assert told.said[-2:] == [("pushed", 1), ("skipped", 1)]


@pytest.mark.parametrize("mode", ["async", "bsp"])
def test_an_observer_changes_nothing(mode: str) -> None:
    servers = [ParameterServer(job(mode), WHOLE, START, GRID, V0, observer=one) for one in (None, Told())]
    for server in servers:
        server.join("worker-0", now=0.0)
        for index in range(3):
            server.push(push(at(index), server.version), now=1.0)
    np.testing.assert_array_equal(servers[0].weights, servers[1].weights)
    np.testing.assert_array_equal(servers[0].journal.take(), servers[1].journal.take())
