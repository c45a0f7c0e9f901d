"""Whole runs of the coordinator: when checkpoints are written, and what happens if one fails."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from psgd.core.driver.checkpoint_schedule import PAUSES_S
from psgd.core.driver.events import Action, Commit, Finish, Save, Stop
from psgd.simulation.cluster import VirtualCluster
from psgd.simulation.observer import ClusterObserver
from psgd_workers.messages import EpochGrid
from tests.support.coordinator_runs import GRID, SIZE, run
from tests.support.in_process import START_S, EachStep, InProcess
from tests.support.jobs import START, job, quadratic


@pytest.mark.parametrize("mode", ["async", "bsp"])
def test_checkpoints_are_made_every_so_many_updates_and_at_the_end(mode: str) -> None:
    host = run(mode, grid=EpochGrid((200,), 200), checkpoint={"every_s": None, "every_updates": 20})
    saved = [checkpoint.updates for checkpoint in host.checkpoints]
    assert saved[-1] == host.servers[0].version.updates
    assert [checkpoint.number for checkpoint in host.checkpoints] == list(range(len(saved)))
    assert len(saved) >= 4
    assert all(20 <= late - early <= 30 for early, late in pairwise(saved[:-1]))


def test_checkpoints_are_made_every_so_many_seconds_of_training() -> None:
    host = run(grid=EpochGrid((200,), 200), checkpoint={"every_s": 2.0})
    times = [at for at, _ in host.did(Commit)]
    assert np.allclose(np.diff([START_S, *times[:-1]]), 2, atol=0.01)
    assert len(times) == 3


def test_waiting_for_something_new_to_save_wakes_nobody() -> None:
    events: list[float] = []
    host = run(
        grid=EpochGrid((4,), 4),
        checkpoint={"every_s": 0.5},
        compute_s=lambda worker, batch: 10.0,
        observers=[EachStep(lambda cluster: events.append(cluster.now))],
    )
    assert host.finish == Finish("finished")
    assert len(events) < 20 * host.now


def test_a_failed_checkpoint_does_not_end_the_run() -> None:
    host = run(checkpoint={"every_s": None, "every_updates": 20}, failing_saves={0, 2})
    assert host.finish == Finish("finished")
    assert [checkpoint.number for checkpoint in host.checkpoints] == [1, 3]


@pytest.mark.parametrize("failures", [1, len(PAUSES_S), len(PAUSES_S) + 1])
def test_the_last_checkpoint_is_tried_again_after_longer_and_longer_pauses(failures: int) -> None:
    host = run(checkpoint={"every_s": None}, failing_saves=range(failures))
    assert host.finish
    times = [at for at, _ in host.did(Save)]
    assert len(times) == min(failures, len(PAUSES_S)) + 1
    assert np.allclose(np.diff(times), PAUSES_S[: len(times) - 1], atol=0.01)
    if failures <= len(PAUSES_S):
        assert host.finish == Finish("finished")
        assert host.checkpoints[0].updates == SIZE
    else:
        assert host.finish.status == "unsaved"
        assert "the disk is full" in str(host.finish.error)


def test_an_interrupted_run_tries_its_last_checkpoint_once_and_does_not_wait() -> None:
    host = run(checkpoint={"every_s": None}, failing_saves=range(9), events=[(2.0, Stop("interrupted"))])
    assert host.finish
    assert (host.finish.status, len(host.did(Save))) == ("unsaved", 1)


def test_an_interrupt_ends_the_pause_before_the_last_checkpoint_is_tried_again() -> None:
    ends = run(checkpoint={"every_s": None}).now
    host = run(checkpoint={"every_s": None}, failing_saves={0}, events=[(ends + 0.5, Stop("interrupted"))])
    assert host.finish == Finish("interrupted")
    first, second = (at for at, _ in host.did(Save))
    assert second - first < PAUSES_S[0]
    assert len(host.checkpoints) == 1


def test_a_server_lost_in_the_pause_is_restored_and_the_last_checkpoint_written() -> None:
    ends = run(checkpoint={"every_s": None}).now

    class Loses(ClusterObserver):
        def acted(self, cluster: VirtualCluster, action: Action) -> None:
            if isinstance(action, Save) and action.checkpoint == 0:
                cluster.after(0.5, cluster.kill_server, 0)

    spec = job(workers=2, checkpoint={"every_s": None})
    host = InProcess(spec, GRID, START, quadratic, failing_saves={0}, observers=[Loses()]).run()
    assert host.finish == Finish("finished")
    assert host.checkpoints[-1].updates == SIZE
    assert host.now > ends + 1


def test_a_full_disk_is_not_hammered() -> None:
    host = run(checkpoint={"every_s": None, "every_updates": 20}, failing_saves=range(1000))
    assert len(host.did(Save)) <= SIZE / 20 + 1 + len(PAUSES_S)
