"""Whole runs of the coordinator: a stop by command, and an interruption by a signal."""

from __future__ import annotations

from typing import Any

import pytest

from psgd.core.driver.coordinator import INTERRUPT_S
from psgd.core.driver.events import Cancel, Finish, Stop, StopWorker
from tests.support.coordinator_runs import run, validate


@pytest.mark.parametrize("mode", ["async", "bsp"])
@pytest.mark.parametrize("status", ["stopped", "interrupted"])
def test_a_stop_finishes_the_batches_in_hand_saves_and_ends(mode: str, status: Any) -> None:
    host = run(mode, run={"epochs": 9}, events=[(2.0, Stop(status))], evaluate=validate)
    assert host.finish == Finish(status)
    assert 0 < host.servers[0].version.updates == host.checkpoints[-1].updates
    assert host.now < 2.5
    validated = host.status.validation_epoch
    assert (validated is not None and validated % 1 != 0) == (status == "stopped")
    assert {cancel.worker for _, cancel in host.did(Cancel)} == {"worker-0", "worker-1"}


@pytest.mark.parametrize("mode", ["async", "bsp"])
def test_an_interrupted_run_waits_for_slow_batches_just_a_moment(mode: str) -> None:
    slow = {"worker-0": 0.05, "worker-1": 30.0}
    stops = [(2.0, Stop("interrupted"))]
    host = run(mode, run={"epochs": 9}, events=stops, compute_s=lambda worker, batch: slow[worker])
    assert host.finish == Finish("interrupted")
    assert host.now <= 2 + INTERRUPT_S + 0.1
    assert host.checkpoints[-1].updates == host.servers[0].version.updates
    assert [stopped.worker for _, stopped in host.did(StopWorker)][-1] == "worker-1"
    assert host.status.charged_failures == 0


def test_an_interruption_hastens_a_stop() -> None:
    stops = [(2.0, Stop("stopped")), (2.5, Stop("interrupted"))]
    host = run(run={"epochs": 9}, events=stops, compute_s=lambda worker, batch: 20.0)
    assert host.finish == Finish("interrupted")
    assert host.now <= 2.5 + INTERRUPT_S + 0.1
