from __future__ import annotations

import json
from dataclasses import replace

import numpy as np

from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.partitions import Partition
from psgd_workers.messages import Version
from tests.support.jobs import GRID, START, job, push

SLICE = Partition(2, 12, 18, 4)


def trained(*epochs: int) -> ParameterServer:
    """Return a second incarnation that applied the first batch of each of these epochs and had its rate changed."""
    first = ParameterServer(job(), SLICE, START, GRID, Version(1, 0))
    for epoch in epochs:
        first.push(push(GRID.batch(epoch, 0), first.version), now=1.0)
    server = ParameterServer.restore(job(), GRID, first.state(), incarnation=3, now=2.0)
    for rate in (0.5, 0.25):
        server.change(job(optimizer={"lr": rate}).settings, now=3.0)
    return server


def test_a_state_says_what_its_server_was() -> None:
    state = trained(0, 1).state()
    state = replace(state, metadata=json.loads(json.dumps(state.metadata)))  # as a checkpoint holds it
    assert state.version == Version(3, 2)
    assert state.history == [(1, 0), (3, 2)]
    assert state.partition == SLICE
    assert state.epochs == 0
    assert state.settings == job(optimizer={"lr": 0.25}).settings
    assert [settings.optimizer.lr for settings in state.changes] == [0.5, 0.25]


def test_bitmaps_are_by_epoch() -> None:
    server = trained(0, 1)
    server.skip(GRID.batch(1, 1), now=4.0)
    settled = server.state().bitmaps("settled")
    assert {epoch: np.flatnonzero(bitmap).tolist() for epoch, bitmap in settled.items()} == {0: [0], 1: [0, 1]}
    skipped = server.state().bitmaps("skipped")
    assert {epoch: np.flatnonzero(bitmap).tolist() for epoch, bitmap in skipped.items()} == {1: [1]}


def test_a_part_is_named_without_its_prefix() -> None:
    server = ParameterServer(job(optimizer={"lr": 0.1, "momentum": 0.9}), SLICE, START, GRID, Version(1, 0))
    server.push(push(GRID.batch(0, 0), server.version), now=1.0)
    assert server.state().part("optimizer").keys() == {"velocity"}
    assert server.state().part("correction") == {}
