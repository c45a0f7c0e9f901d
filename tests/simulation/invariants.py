"""Invariants of a run with faults, checked independently of the server's own counters.

An `Auditor` notes which gradients a server's state contains, which versions it had and how many pushes it received. The
notes on a saved state are kept, and used again when that state is restored.

The checks use a toy problem. Each batch has its own weight in every partition, and its gradient is 1 there and 0
elsewhere. With plain steps of rate 1 the weights themselves show which batches they contain.
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

ALIGNMENT = 16  # partitions are cut at multiples of this number of values


class ViolationError(AssertionError):
    """An invariant does not hold."""


def one_hot(grid: EpochGrid, epochs: int, servers: int) -> Problem:
    """Return the toy problem, with one weight per batch in every partition."""
    size = -(-epochs * grid.num_batches // ALIGNMENT) * ALIGNMENT  # of a partition

    def gradient(batch: BatchId, weights: FloatArray, out: FloatArray) -> float:
        del weights
        out[:] = 0
        out[_number(grid, batch) :: size] = 1
        return 1.0

    return Problem(grid, np.zeros(servers * size, np.float32), gradient)


def _number(grid: EpochGrid, batch: BatchId) -> int:
    """Return the number of a batch among the batches of all epochs."""
    return batch.epoch * grid.num_batches + grid.position(batch)


@dataclass(slots=True)
class Notes:
    """Notes on the contents of a server's state.

    Attributes:
        contained: number of times that the state contains each batch.
        skipped: batches that the partition skips.
        versions: versions of the weights, including the versions of ancestors.
        pushes: number of pushes, including the pushes to ancestors.
        exact: True if every gradient so far was a step of its own.
    """

    contained: Counter[BatchId] = field(default_factory=Counter)
    skipped: set[BatchId] = field(default_factory=set)
    versions: set[Version] = field(default_factory=set)
    pushes: int = 0
    exact: bool = True

    def copy(self) -> Notes:
        return Notes(self.contained.copy(), self.skipped.copy(), self.versions.copy(), self.pushes, self.exact)


class Auditor(ServerObserver):
    """An observer of one server of the toy problem, which checks the server against its own notes.

    Args:
        audit: audit of the run.

    Attributes:
        notes: notes on the server's state.
    """

    def __init__(self, audit: Audit) -> None:
        self._audit = audit
        self.notes = Notes()

    def started(self, server: ParameterServer) -> None:
        self.notes.versions.add(server.version)

    def pushed(self, gradient: Gradient) -> None:
        self.notes.pushes += 1

    def collected(self, gradient: Gradient) -> None:
        notes = self.notes
        batch = gradient.batch
        notes.contained[batch] += 1
        _check(notes.contained[batch] == 1, f"{batch} is used a second time")
        _check(batch not in notes.skipped, f"{batch} is used after it was skipped")
        _check(gradient.read in notes.versions, f"{gradient.read} is not an ancestor of {max(notes.versions)}")

    def skipped(self, batch: BatchId) -> None:
        _check(batch not in self.notes.contained, f"{batch} is skipped after it was used")
        self.notes.skipped.add(batch)

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
        """Compare a server's report and weights with the notes.

        Raises:
            ViolationError: they differ.
        """
        report = server.report()
        notes = self.notes
        grid = self._audit.grid
        _check(sum(report.pushes.values()) == notes.pushes, f"{notes.pushes} pushes are counted as {report.pushes}")
        contained = sum(notes.contained.values())
        reported = report.pushes["applied"] + report.pushes["buffered"]
        _check(contained == reported, f"{contained} gradients are in the state, and {reported} are reported")
        settled = {batch for batch in notes.contained.keys() | notes.skipped if _is_settled(report, grid, batch)}
        _check(len(settled) == report.contained(grid), "the applied set differs from the batches in the state")
        steps = max(version.updates for version in notes.versions)
        _check(len({version.updates for version in notes.versions}) == steps + 1, "the versions do not count the steps")
        if not report.pushes["buffered"] and not self._audit.compressed:
            self._check_weights(server)

    def _check_weights(self, server: ParameterServer) -> None:
        """Check that each gradient in a step changed its weight, and by exactly 1 if each step holds one gradient."""
        expected = np.zeros_like(server.weights)
        for batch, count in self.notes.contained.items():
            expected[_number(self._audit.grid, batch)] = -count
        weights = server.weights if self.notes.exact else np.sign(server.weights)
        _check(
            np.array_equal(weights, expected),
            f"the weights {server.weights.tolist()} do not match {self.notes.contained}",
        )


def _is_settled(report: Report, grid: EpochGrid, batch: BatchId) -> bool:
    """Return True if a report says that the state contains a batch."""
    bitmap = report.settled.get(batch.epoch)
    return batch.epoch < report.epochs or (bitmap is not None and bool(bitmap[grid.position(batch)]))


class Audit:
    """The checks of all servers of one run, through all processes of its driver.

    Args:
        grid: shape of an epoch.
        compressed: True if the weights cannot be checked, because compression delays values.

    Attributes:
        auditors: observers of the newest servers, by partition.
    """

    def __init__(self, grid: EpochGrid, compressed: bool) -> None:
        self.grid = grid
        self.compressed = compressed
        self.auditors: dict[int, Auditor] = {}
        self._kept: list[tuple[ServerState, Notes]] = []

    def observe(self, partition: int) -> Auditor:
        """Return an observer for a server that starts now."""
        auditor = self.auditors[partition] = Auditor(self)
        return auditor

    def keep(self, state: ServerState, notes: Notes) -> None:
        """Keep the notes on a saved state."""
        self._kept.append((state, notes))

    def notes(self, state: ServerState) -> Notes:
        """Return the notes on a saved state, which is found by identity."""
        return next(notes for kept, notes in self._kept if kept is state)

    def check_end(self, cluster: VirtualCluster, epochs: int) -> None:
        """Check a run that ended.

        Args:
            cluster: cluster of the driver's last process.
            epochs: number of epochs of the job.

        Raises:
            ViolationError: the run did not finish, a batch is missing, or something is left over.
        """
        finish = cluster.finish
        _check(finish is not None and finish.status == "finished", f"the run ended as {finish}")
        saved = cluster.newest_checkpoint
        _check(saved is not None, "no checkpoint was saved")
        assert saved
        for partition, state in enumerate(saved.states):
            self._check_state(partition, state, epochs)
        for partition, server in cluster.servers.items():  # a server may have died after the last checkpoint
            auditor = self.auditors[partition]
            auditor.check(server)
            last = self.notes(saved.states[partition])
            _check(auditor.notes.contained == last.contained, "the last checkpoint lacks the last gradients")
            live = {worker.name for worker in cluster.status.workers if worker.joined}
            _check(server.clocks.keys() <= live, "a round waits for workers that have left")
        _check(cluster.status.open_leases == 0, "leases are still open at the end")
        known = {worker.name for worker in cluster.status.workers}
        _check(cluster.workers.keys() <= known, f"workers {cluster.workers.keys() - known} are still alive")

    def _check_state(self, partition: int, state: ServerState, epochs: int) -> None:
        """Check that a saved state contains every batch once, unless it was skipped."""
        grid = self.grid
        notes = self.notes(state)
        batches = {grid.batch(epoch, position) for epoch in range(epochs) for position in range(grid.num_batches)}
        missing = batches - notes.contained.keys() - notes.skipped
        _check(not missing, f"partition {partition} ended without {sorted(missing)}")
        _check(len(notes.contained) + len(notes.skipped) == len(batches), "a batch is both contained and skipped")
        applied = state.metadata["pushes"].get("applied", 0)
        _check(
            (state.metadata["epochs"], applied) == (epochs, len(notes.contained)), "an epoch or a round is not complete"
        )


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ViolationError(message)
