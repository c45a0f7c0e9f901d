"""What a run owes whatever happens to it, found out without believing its own accounts.

A `WatchedServer` notes which gradients its state is made of, which versions it went through and what it heard. The
notes are part of the state, so that they go the way of the weights: into a checkpoint, and back from it.

In the toy problem that belongs to it every batch has a value of its own in every partition, and a gradient that is one
there and zero elsewhere. With plain steps of rate 1 the weights themselves then say which batches they contain.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Self

import numpy as np

from psgd.core.server.aggregators import OneGradient
from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.published import Published
from psgd.core.server.state import ServerState
from psgd.simulation.cluster import VirtualCluster
from psgd.simulation.problem import Problem
from psgd.spec import JobSpec
from psgd_workers.messages import BatchId, EpochGrid, FloatArray, Gradient, Outcome, Receipt

__all__ = ["ViolationError", "WatchedServer", "check_end", "one_hot"]

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


class WatchedServer(ParameterServer):
    """A server of the toy problem that is not believed.

    Attributes:
        contained: how often the state contains each batch.
        without: batches that are done without.
        versions: that the weights went through, ancestors included.
        heard: pushes, ancestors' included.
        exact: whether every gradient so far was a step of its own.
        compressed: whether weights say nothing, as values are left out and come later.
    """

    def __init__(self, spec: JobSpec, *arguments: Any, **options: Any) -> None:
        super().__init__(spec, *arguments, **options)
        self.contained = Counter[BatchId]()
        self.without: set[BatchId] = set()
        self.versions = {self.version}
        self.heard = 0
        self.exact = isinstance(self._aggregator, OneGradient)
        self.compressed = spec.compression.name != "none"

    def push(self, gradient: Gradient, now: float) -> tuple[Receipt, ...]:
        """Count it."""
        self.heard += 1
        return super().push(gradient, now)

    def skip(self, batch: BatchId, examples: int, now: float) -> tuple[Receipt, ...]:
        """Note what is done without, unless it is contained."""
        if batch not in self.contained:
            self.without.add(batch)
        return super().skip(batch, examples, now)

    def _admit(self, gradient: Gradient) -> Outcome:
        outcome = super()._admit(gradient)
        if outcome is Outcome.DISCARDED:
            self.without.add(gradient.batch)
        return outcome

    def _collect(self, gradient: Gradient) -> None:
        self.contained[gradient.batch] += 1
        _check(self.contained[gradient.batch] == 1, f"{gradient.batch} is taken in a second time")
        _check(gradient.batch not in self.without, f"{gradient.batch} is taken in, and was to be done without")
        _check(gradient.read in self.versions, f"{gradient.read} is no ancestor of {self.version}")
        super()._collect(gradient)

    def _close(self, now: float) -> None:
        super()._close(now)
        self.versions.add(self.version)

    def _set(self, settings: Any) -> None:
        super()._set(settings)
        if hasattr(self, "exact"):
            self.exact = self.exact and isinstance(self._aggregator, OneGradient)

    def state(self) -> ServerState:
        """With what is noted."""
        self.audit()
        state = super().state()
        noted = (self.contained.copy(), self.without.copy(), self.versions.copy(), self.heard, self.exact)
        return ServerState(state.arrays, {**state.metadata, "noted": noted})

    @classmethod
    def restore(
        cls,
        spec: JobSpec,
        grid: EpochGrid,
        state: ServerState,
        incarnation: int,
        now: float,
        published: Published | None = None,
    ) -> Self:
        """As it was noted when the state was saved."""
        server = super().restore(spec, grid, state, incarnation, now, published)
        contained, without, versions, server.heard, server.exact = state.metadata["noted"]
        server.contained = contained.copy()
        server.without = without.copy()
        server.versions = versions | {server.version}
        return server

    def audit(self) -> None:
        """Compare what it says with what was noted.

        Raises:
            ViolationError: they differ.
        """
        report = self.report()
        _check(sum(report.pushes.values()) == self.heard, f"{self.heard} pushes, accounted as {report.pushes}")
        taken = sum(self.contained.values())
        said = report.pushes["applied"] + report.pushes["buffered"]
        _check(taken == said, f"{taken} gradients are in the state, and {said} are said to be")
        settled = {batch for batch in self.contained | Counter(self.without) if batch in self._settled}
        _check(len(settled) == report.contained(self._grid), "the applied set is not what the state contains")
        steps = max(version.updates for version in self.versions)
        _check(len({version.updates for version in self.versions}) == steps + 1, "versions are not the steps taken")
        self._check_weights()

    def _check_weights(self) -> None:
        """Every gradient that is in a step moved one weight; with one gradient for each step, by one."""
        if self.compressed or len(self._aggregator):
            return
        moved = np.zeros_like(self.weights)
        for batch, count in self.contained.items():
            moved[_number(self._grid, batch)] = -count
        weights = self.weights if self.exact else np.sign(self.weights)
        _check(np.array_equal(weights, moved), f"the weights {self.weights.tolist()} are not of {self.contained}")


def check_end(cluster: VirtualCluster, epochs: int) -> None:
    """Check a run that ended.

    Args:
        cluster: where it ran.
        epochs: how many it was to make.

    Raises:
        ViolationError: something is missing, there twice, or left over.
    """
    finish = cluster.finish
    grid = cluster.problem.grid
    _check(finish is not None and finish.status == "finished", f"the run ended as {finish}")
    everything = {grid.batch(epoch, position) for epoch in range(epochs) for position in range(grid.num_batches)}
    saved = cluster.newest_checkpoint
    _check(saved is not None, "nothing was saved")
    assert saved
    for partition, state in enumerate(saved.states):
        contained, without, *_ = state.metadata["noted"]
        missing = everything - contained.keys() - without
        _check(not missing, f"partition {partition} ended without {sorted(missing)}")
        _check(len(contained) + len(without) == len(everything), "some batch is both in and out")
        applied = state.metadata["pushes"].get("applied", 0)
        _check((state.metadata["epochs"], applied) == (epochs, len(contained)), "an epoch is open, or a round")
    for partition, server in cluster.servers.items():  # one may have died after the last checkpoint
        assert isinstance(server, WatchedServer)
        server.audit()
        _check(server.contained == saved.states[partition].metadata["noted"][0], "what was done last is not durable")
        live = {worker.name for worker in cluster.status.workers if worker.joined}
        _check(server.report().heard.keys() <= live, "rounds wait for workers that are gone")
    _check(cluster.status.open_leases == 0, "leases are out")
    known = {worker.name for worker in cluster.status.workers}
    _check(cluster.workers.keys() <= known, f"{cluster.workers.keys() - known} still live")


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ViolationError(otherwise)
