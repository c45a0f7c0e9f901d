from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from psgd.core.driver.checkpoint_schedule import PAUSES_S
from psgd.core.driver.events import Action, Stop
from psgd.core.driver.status import RunStatus
from psgd.monitoring.observer import METRICS_S, RunObserver
from psgd.monitoring.progress import Display
from psgd.simulation.cluster import VirtualCluster
from psgd.simulation.observer import ClusterObserver
from psgd.store.run_directory import RunDirectory
from psgd.store.storage import Storage
from psgd_workers.messages import EpochGrid, Evaluation
from tests.support.in_process import InProcess
from tests.support.jobs import START, job, quadratic
from tests.support.statuses import status

GRID = EpochGrid((60,), 60)
EVERY = {"every_s": None, "every_updates": 20}


class Observed(InProcess):
    """A run of one worker, observed after each action of the coordinator."""

    def __init__(self, folder: Path, checkpoint: dict[str, Any], **options: Any) -> None:
        spec = job(run={"epochs": 1}, checkpoint=checkpoint)
        self.told: list[str] = []
        self.directory = RunDirectory(Storage(str(folder)))
        display = Display(spec, Console(quiet=True))
        self.observer = RunObserver(self.directory, display, self.told.append, 0.0)
        super().__init__(spec, GRID, START, quadratic, observers=[Shown(self.observer)], **options)


class Shown(ClusterObserver):
    """Lets an observer read the coordinator's status after each of its actions."""

    def __init__(self, observer: RunObserver) -> None:
        self._observer = observer

    def acted(self, cluster: VirtualCluster, action: Action) -> None:
        self._observer(cluster.coordinator.status, cluster.now)


@pytest.mark.parametrize(
    ("failing", "told"),
    [
        ([], []),
        ([0], ["Training goes on; nothing is saved"]),
        ([0, 1], ["Training goes on; nothing is saved"]),
        ([1], ["Training goes on; the newest checkpoint contains 20 updates and 0 complete epochs"]),
    ],
)
def test_people_are_told_once_that_checkpoints_fail_until_one_does_not(
    tmp_path: Path, failing: list[int], told: list[str]
) -> None:
    run = Observed(tmp_path, EVERY, failing_saves=failing).run()
    assert run.finish is not None
    assert run.finish.status == "finished"
    assert run.told == [f"a checkpoint could not be written: the disk is full. {rest}" for rest in told]


def test_they_are_told_that_the_last_one_is_tried_again(tmp_path: Path) -> None:
    run = Observed(tmp_path, {"every_s": None}, failing_saves=range(len(PAUSES_S) + 1)).run()
    assert run.finish is not None
    assert run.finish.status == "unsaved"
    assert run.told == ["a checkpoint could not be written: the disk is full. It is tried again; nothing is saved"]


def test_what_the_result_says_is_not_told_before(tmp_path: Path) -> None:
    run = Observed(tmp_path, {"every_s": None}, failing_saves=[0], events=[(2.0, Stop("interrupted"))]).run()
    assert run.finish is not None
    assert run.finish.status == "unsaved"
    assert run.told == []


def test_metrics_are_a_line_a_second(tmp_path: Path) -> None:
    run = Observed(tmp_path, EVERY, compute_s=lambda worker, batch: 0.1).run()
    lines = [json.loads(line) for line in run.directory.storage.read("metrics.jsonl").splitlines()]
    assert run.now / METRICS_S - 2 <= len(lines) <= run.now / METRICS_S
    assert [line["updates"] for line in lines] == sorted(line["updates"] for line in lines)
    assert lines[-1].keys() > {"epochs", "updates", "workers", "train/loss", "perf/updates_per_s"}


def test_a_line_tells_the_epoch_of_its_validation(tmp_path: Path) -> None:
    run = Observed(tmp_path, EVERY, compute_s=lambda worker, batch: 0.1, evaluate=lambda weights: Evaluation(1, 0.5, 1))
    run.run()
    run.observer.finish(run.status)
    lines = [json.loads(line) for line in run.directory.storage.read("metrics.jsonl").splitlines()]
    assert [line["val/epoch"] for line in lines[:5]] == [None] * 5  # the epoch takes six seconds
    assert (lines[-1]["epochs"], lines[-1]["val/epoch"], lines[-1]["val/accuracy"]) == (1, 1, 0.5)


def test_the_status_is_made_a_few_times_a_second_however_much_happens(tmp_path: Path) -> None:
    made: list[float] = []

    def make(now: float) -> RunStatus:
        made.append(now)
        return status(now=now)

    observer = Observed(tmp_path, EVERY).observer
    for event in range(10_000):
        observer(make, event / 10_000)
    assert len(made) == 5


def test_the_end_of_a_run_that_another_driver_took_over_is_not_written(tmp_path: Path) -> None:
    run = Observed(tmp_path, EVERY)
    run.directory.is_ours = False
    run.observer.finish(status())
    assert not run.directory.storage.exists("metrics.jsonl")
