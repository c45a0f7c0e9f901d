"""Whole runs of the coordinator on a virtual clock, for the tests of `psgd.core.driver`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from psgd.core.driver.coordinator import Coordinator
from psgd.core.driver.events import Grant, Note, Started
from psgd_workers.messages import BatchId, EpochGrid, Evaluation, FloatArray, Lease
from tests.support.in_process import FaultKind, InProcess
from tests.support.jobs import START, job, quadratic

__all__ = [
    "FAULTS",
    "GRID",
    "SIZE",
    "assert_exactly_once",
    "leased",
    "notes",
    "run",
    "run_killing",
    "speeds",
    "start",
    "validate",
    "validations",
]

GRID = EpochGrid((37, 36), 73)
SIZE = GRID.num_batches
FAULTS: list[FaultKind] = ["before", "after", "late", "silent", "lane"]
SECTIONS = ("run", "optimizer", "checkpoint", "failure", "scaling")

Speeds = Callable[[str, BatchId], float]


def speeds(seed: int) -> Speeds:
    """Return (worker, batch) -> seconds, drawn from a seed; some workers are up to ten times as slow as others."""

    def seconds(worker: str, batch: BatchId) -> float:
        slot = int(worker.removeprefix("worker-"))
        pace = 10 ** np.random.default_rng([seed, slot]).random()
        return float(0.01 * pace * (0.5 + np.random.default_rng([seed, slot, *batch]).random()))

    return seconds


def run(mode: str = "async", workers: int = 2, grid: EpochGrid = GRID, **options: Any) -> InProcess:
    """Run a job to its end. `options` named in SECTIONS belong to the job, the others to `InProcess`."""
    sections = {name: options.pop(name) for name in SECTIONS if name in options}
    gradient = options.pop("gradient", quadratic)
    return InProcess(job(mode, workers, **sections), grid, START, gradient, **options).run()


def run_killing(kills: Sequence[tuple[float, int]], mode: str = "async", workers: int = 2, **options: Any) -> InProcess:
    """Run a job to its end and kill some of its servers.

    Args:
        kills: (virtual seconds, partition) of each killed server.
        mode: consistency mode.
        workers: number of workers.
        options: as in `run`.
    """
    sections = {name: options.pop(name) for name in (*SECTIONS, "consistency") if name in options}
    host = InProcess(job(mode, workers, **sections), options.pop("grid", GRID), START, quadratic, **options)
    for at, partition in kills:
        host.after(at, host.kill_server, partition)
    return host.run()


def start(mode: str = "async", workers: int = 2) -> tuple[Coordinator, Sequence[object]]:
    """Return a coordinator that was just started, and its first actions."""
    coordinator = Coordinator(job(mode, workers), GRID, validates=False)
    return coordinator, coordinator.handle(Started(), 0.0)


def assert_exactly_once(host: InProcess, epochs: int, grid: EpochGrid = GRID) -> None:
    """Assert that every server contains each batch of the first `epochs` epochs exactly once."""
    everything = [grid.batch(epoch, position) for epoch in range(epochs) for position in range(grid.num_batches)]
    assert Counter(applied.batch for applied in host.applied) == Counter(everything)
    for server in host.servers.values():
        assert (server.epochs, server.report().pushes["applied"]) == (epochs, len(everything))


def validate(weights: FloatArray) -> Evaluation:
    """Return an evaluation whose loss identifies the weights."""
    return Evaluation(float(weights.sum()), None, 1)


def validations(host: InProcess) -> dict[int, Evaluation | None]:
    """Return epoch -> validation for every complete epoch."""
    return {epoch.epoch: epoch.validation for epoch in host.status.recent_epochs}


def notes(host: InProcess, event: str) -> list[dict[str, Any]]:
    """Return the fields of every note of one event, in order."""
    return [dict(note.fields) for _, note in host.did(Note) if note.event == event]


def leased(actions: Collection[tuple[float, Grant]]) -> list[Lease]:
    """Return the leases of all grants, in order."""
    return [grant.lease for _, grant in actions]
