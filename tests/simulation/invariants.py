"""What a run owes whatever fails, found out without believing its own accounts.

An `Auditor` notes which gradients a server's state is made of, which versions it went through and how many pushes it
heard. The notes of a state that is saved are kept with it and taken up again where the state is restored.

In the toy problem that belongs to it every batch has a value of its own in every partition, and a gradient that is one
there and zero elsewhere. With plain steps of rate 1 the weights themselves then say which batches they contain.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from psgd.core.server.aggregators import OneGradient
from psgd.core.server.consistency import build_consistency
from psgd.core.server.observer import ServerObserver
from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.report import Report
from psgd.core.server.state import ServerState
from psgd.simulation.cluster import VirtualCluster
from psgd.simulation.problem import Problem
from psgd_workers.messages import BatchId, EpochGrid, FloatArray, Gradient, Version

__all__ = ["Audit", "Auditor", "ViolationError", "one_hot"]

LINE = 16  # partitions are cut at multiples of so many values


class ViolationError(AssertionError):
    """An invariant does not hold."""


def one_hot(grid: EpochGrid, epochs: int, servers: int) -> Problem:
    """The toy problem."""
    size = -(-epochs * grid.num_batches // LINE) * LINE

    def gradient(batch: BatchId, weights: FloatArray, out: FloatArray) -> float:
        del weights
        out[:] = 0
        out[_number(grid, batch) :: size] = 1
        return 1.0

    return Problem(grid, np.zeros(servers * size, np.float32), gradient)


def _number(grid: EpochGrid, batch: BatchId) -> int:
    return batch.epoch * grid.num_batches + grid.position(batch)


@dataclass(slots=True)
class Notes:
    """What a state is made of.

    Attributes:
        contained: how often the state contains each batch.
        without: batches that the partition does without.
        versions: versions that the weights went through, ancestors included.
        heard: number of pushes, those of ancestors included.
        exact: true if every gradient so far was a step of its own.
    """

    contained: Counter[BatchId] = field(default_factory=Counter)
    without: set[BatchId] = field(default_factory=set)
    versions: set[Version] = field(default_factory=set)
    heard: int = 0
    exact: bool = True

    def copy(self) -> Notes:
        return Notes(self.contained.copy(), self.without.copy(), self.versions.copy(), self.heard, self.exact)


class Auditor(ServerObserver):
    """Watches one server of the toy problem, and does not believe it.

    Args:
        audit: of the run.

    Attributes:
        notes: on the server's state.
    """

    def __init__(self, audit: Audit) -> None:
        self._audit = audit
        self.notes = Notes()

    def started(self, server: ParameterServer) -> None:
        self.notes.versions.add(server.version)

    def pushed(self, gradient: Gradient) -> None:
        self.notes.heard += 1

    def collected(self, gradient: Gradient) -> None:
        notes = self.notes
        batch = gradient.batch
        notes.contained[batch] += 1
        _check(notes.contained[batch] == 1, f"{batch} is taken in a second time")
        _check(batch not in notes.without, f"{batch} is taken in, and was to be done without")
        _check(gradient.read in notes.versions, f"{gradient.read} is not an ancestor of {max(notes.versions)}")

    def skipped(self, batch: BatchId) -> None:
        _check(batch not in self.notes.contained, f"{batch} is to be done without, and was taken in")
        self.notes.without.add(batch)

    def stepped(self, server: ParameterServer) -> None:
        self.notes.versions.add(server.version)
        mode = build_consistency(server.settings.consistency)
        self.notes.exact = self.notes.exact and isinstance(mode.aggregator(0, 0), OneGradient)

    def saved(self, server: ParameterServer, state: ServerState) -> None:
        self.check(server)
        self._audit.keep(state, self.notes.copy())

    def restored(self, server: ParameterServer, state: ServerState) -> None:
        self.notes = self._audit.notes(state).copy()
        self.notes.versions.add(server.version)

    def check(self, server: ParameterServer) -> None:
        """Compare what a server says with what was noted.

        Raises:
            ViolationError: they differ.
        """
        report = server.report()
        notes = self.notes
        grid = self._audit.grid
        _check(sum(report.pushes.values()) == notes.heard, f"{notes.heard} pushes, accounted as {report.pushes}")
        taken = sum(notes.contained.values())
        said = report.pushes["applied"] + report.pushes["buffered"]
        _check(taken == said, f"{taken} gradients are in the state, and {said} are said to be")
        settled = {batch for batch in notes.contained.keys() | notes.without if _is_settled(report, grid, batch)}
        _check(len(settled) == report.contained(grid), "the applied set is not what the state contains")
        steps = max(version.updates for version in notes.versions)
        _check(len({version.updates for version in notes.versions}) == steps + 1, "versions are not the steps taken")
        if not report.pushes["buffered"] and not self._audit.compressed:
            self._check_weights(server)

    def _check_weights(self, server: ParameterServer) -> None:
        """Every gradient that is in a step moved one weight; with one gradient for each step, by one."""
        moved = np.zeros_like(server.weights)
        for batch, count in self.notes.contained.items():
            moved[_number(self._audit.grid, batch)] = -count
        weights = server.weights if self.notes.exact else np.sign(server.weights)
        _check(
            np.array_equal(weights, moved), f"the weights {server.weights.tolist()} are not of {self.notes.contained}"
        )


def _is_settled(report: Report, grid: EpochGrid, batch: BatchId) -> bool:
    bitmap = report.settled.get(batch.epoch)
    return batch.epoch < report.epochs or (bitmap is not None and bool(bitmap[grid.position(batch)]))


class Audit:
    """Every server of one run, through all processes of its driver.

    Args:
        grid: the shape of an epoch.
        compressed: true if the weights tell nothing, as compression leaves values out that come later.
    """

    def __init__(self, grid: EpochGrid, compressed: bool) -> None:
        self.grid = grid
        self.compressed = compressed
        self.auditors: dict[int, Auditor] = {}  # of the servers that started last, by partition
        self._kept: list[tuple[ServerState, Notes]] = []

    def observe(self, partition: int) -> Auditor:
        """Return the observer of a server that starts now."""
        auditor = self.auditors[partition] = Auditor(self)
        return auditor

    def keep(self, state: ServerState, notes: Notes) -> None:
        """Keep the notes on a state that is saved."""
        self._kept.append((state, notes))

    def notes(self, state: ServerState) -> Notes:
        """Return the notes on a state that was saved: on this very object."""
        return next(notes for kept, notes in self._kept if kept is state)

    def check_end(self, cluster: VirtualCluster, epochs: int) -> None:
        """Check a run that ended.

        Args:
            cluster: where it ran.
            epochs: how many it was to make.

        Raises:
            ViolationError: something is missing, there twice, or left over.
        """
        finish = cluster.finish
        _check(finish is not None and finish.status == "finished", f"the run ended as {finish}")
        saved = cluster.newest_checkpoint
        _check(saved is not None, "nothing was saved")
        assert saved
        for partition, state in enumerate(saved.states):
            self._check_state(partition, state, epochs)
        for partition, server in cluster.servers.items():  # one may have died after the last checkpoint
            auditor = self.auditors[partition]
            auditor.check(server)
            last = self.notes(saved.states[partition])
            _check(auditor.notes.contained == last.contained, "what was done last is not durable")
            live = {worker.name for worker in cluster.status.workers if worker.joined}
            _check(server.report().heard.keys() <= live, "rounds wait for workers that are gone")
        _check(cluster.status.open_leases == 0, "leases are out")
        known = {worker.name for worker in cluster.status.workers}
        _check(cluster.workers.keys() <= known, f"{cluster.workers.keys() - known} still live")

    def _check_state(self, partition: int, state: ServerState, epochs: int) -> None:
        grid = self.grid
        notes = self.notes(state)
        everything = {grid.batch(epoch, position) for epoch in range(epochs) for position in range(grid.num_batches)}
        missing = everything - notes.contained.keys() - notes.without
        _check(not missing, f"partition {partition} ended without {sorted(missing)}")
        _check(len(notes.contained) + len(notes.without) == len(everything), "some batch is both in and out")
        applied = state.metadata["pushes"].get("applied", 0)
        _check((state.metadata["epochs"], applied) == (epochs, len(notes.contained)), "an epoch is open, or a round")


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ViolationError(otherwise)
