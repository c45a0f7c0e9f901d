"""Whole jobs on the production core, in one thread and on a virtual clock: no Ray, no disk, no sleeping.

`InProcess` is the simulator's cluster with failures that a test scripts by (worker, push), and a record of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from math import inf
from typing import Any, Literal, NamedTuple, Self, TypeVar

import numpy as np

from psgd.core.driver.events import Action, Commit, Save, SaveFailed
from psgd.simulation.cluster import VirtualCheckpoint, VirtualCluster
from psgd.simulation.faults import FaultPlan, PushFault
from psgd.simulation.observer import ClusterObserver
from psgd.simulation.problem import Problem, Timing
from psgd.spec import JobSpec
from psgd_workers.messages import BatchId, EpochGrid, Evaluation, FloatArray, Gradient, Outcome, Receipt, Version

__all__ = ["Applied", "EachStep", "Fault", "InProcess", "ScriptedFaults", "VirtualCheckpoint"]

TIMING = Timing()
START_S = TIMING.start_s
EVALUATE_S = TIMING.evaluate_s
LATE_S = 0.5  # time from a worker's death to the arrival of its late push
MAX_EVENTS = 50_000

SomeAction = TypeVar("SomeAction", bound=Action)

FaultKind = Literal["before", "after", "late", "torn", "silent", "lane"]


class Fault(NamedTuple):
    """A scripted fault at a worker's n-th push.

    - `before`: the worker dies before it pushes.
    - `after`: the worker dies after the push reached the servers, and before it gets the receipt.
    - `late`: the worker dies while the push is under way; the push arrives later.
    - `torn`: the worker dies when the push has reached only the first server.
    - `silent`: the worker hangs instead of pushing.
    - `lane`: the push arrives and the receipt is lost; the worker lives.
    """

    worker: str
    push: int  # from 0
    kind: FaultKind


class Applied(NamedTuple):
    """A gradient that the first partition applied."""

    worker: str
    batch: BatchId
    read: Version
    after: Version


class ScriptedFaults(FaultPlan):
    """Faults by worker and push, and checkpoints that cannot be written.

    Args:
        faults: faults of the workers.
        failing_saves: numbers of the checkpoints that fail.
        skew_s: largest delay of a push's part on its way to one of several servers, in seconds; drawn for each part.
    """

    def __init__(self, faults: Sequence[Fault] = (), failing_saves: Collection[int] = (), skew_s: float = 0.0) -> None:
        self._faults: Mapping[tuple[str, int], FaultKind] = {(f.worker, f.push): f.kind for f in faults}
        self._failing_saves = failing_saves
        self._skew_s = skew_s
        self._skews = np.random.default_rng(11)

    def begin(self, cluster: VirtualCluster) -> None:
        self._cluster = cluster

    def push(self, worker: str, number: int, partitions: int) -> PushFault | None:
        fault = self._faults.get((worker, number))
        if fault is None:
            return PushFault(self._copies(partitions)) if self._skew_s and partitions > 1 else None
        nothing: Sequence[Sequence[float]] = [()] * partitions
        match fault:
            case "silent":
                return PushFault(nothing, "hangs")
            case "lane":
                return PushFault(self._copies(partitions), "loses its lane")
            case "before":
                return PushFault(nothing, "dies", fault)
            case "torn":
                return PushFault([(0.0,), *nothing[1:]], "dies", fault)
            case "late":
                return PushFault([(LATE_S + delay,) for (delay,) in self._copies(partitions)], "dies", fault)
            case "after":
                return PushFault(self._copies(partitions), "dies", fault)

    def _copies(self, partitions: int) -> Sequence[tuple[float]]:
        if not self._skew_s or partitions == 1:
            return [(0.0,)] * partitions
        return [(self._skew_s * float(self._skews.random()),) for _ in range(partitions)]

    def allows(self, action: Action) -> bool:
        if isinstance(action, Save) and action.checkpoint in self._failing_saves:
            self._cluster.tell_soon(SaveFailed(action.checkpoint, "the disk is full"))
            return False
        return True


class _Recorder(ClusterObserver):
    """Records reads, applied gradients, checkpoints and actions."""

    def __init__(self) -> None:
        self._reads: dict[tuple[str, BatchId], Version] = {}
        self.applied: list[Applied] = []
        self.checkpoints: list[VirtualCheckpoint] = []
        self.actions: list[tuple[float, Action]] = []

    def acted(self, cluster: VirtualCluster, action: Action) -> None:
        self.actions.append((cluster.now, action))
        if isinstance(action, Commit) and cluster.checkpoint:
            self.checkpoints.append(cluster.checkpoint)

    def pushed(self, cluster: VirtualCluster, partition: int, gradient: Gradient) -> None:
        if partition == 0:
            self._reads[gradient.worker, gradient.batch] = gradient.read

    def answered(self, cluster: VirtualCluster, partition: int, receipt: Receipt) -> None:
        if partition == 0 and receipt.outcome is Outcome.APPLIED:
            read = self._reads[receipt.worker, receipt.batch]
            self.applied.append(Applied(receipt.worker, receipt.batch, read, receipt.version))


class EachStep(ClusterObserver):
    """Calls a function after each step of the first partition."""

    def __init__(self, check: Callable[[VirtualCluster], object]) -> None:
        self._check = check

    def stepped(self, cluster: VirtualCluster) -> None:
        self._check(cluster)


def _constant_s(worker: str, batch: BatchId) -> float:
    return 0.05


class InProcess(VirtualCluster):
    """One run.

    Args:
        spec: the job; its model and data are not used.
        grid: the shape of an epoch.
        weights: `[num_parameters]`, the initial weights, without buffers.
        gradient: (batch, weights, out) -> loss, as `psgd_workers.worker.Worker.gradient`.
        compute_s: (worker, batch) -> virtual seconds of one gradient.
        start_s: worker -> virtual seconds that its process takes to start; infinite if it never starts.
        evaluate: weights -> result; None if there is nothing to validate on.
        faults: faults of the workers.
        failing_saves: numbers of the checkpoints that cannot be written.
        skew_s: largest delay of a push's part on its way to one of several servers, in virtual seconds.
        observers: observers of the run.
        options: further arguments of `VirtualCluster`.

    Attributes:
        applied: gradients that the first partition applied in this process, in order.
        checkpoints: committed checkpoints, oldest first.
        actions: (virtual time, action) of all that the coordinator decided.
    """

    def __init__(
        self,
        spec: JobSpec,
        grid: EpochGrid,
        weights: FloatArray,
        gradient: Callable[[BatchId, FloatArray, FloatArray], float],
        *,
        compute_s: Callable[[str, BatchId], float] = _constant_s,
        start_s: Callable[[str], float] = lambda worker: START_S,
        evaluate: Callable[[FloatArray], Evaluation] | None = None,
        faults: Sequence[Fault] = (),
        failing_saves: Collection[int] = (),
        skew_s: float = 0.0,
        observers: Sequence[ClusterObserver] = (),
        **options: Any,
    ) -> None:
        problem = Problem(grid, weights, gradient, evaluate=evaluate)
        recorder = _Recorder()
        super().__init__(
            spec,
            problem,
            compute_s,
            start_s=start_s,
            faults=ScriptedFaults(faults, failing_saves, skew_s),
            observers=[recorder, *observers],
            **options,
        )
        self.applied = recorder.applied
        self.checkpoints = recorder.checkpoints
        self.actions = recorder.actions

    def run(self, max_events: int = MAX_EVENTS, max_s: float = inf) -> Self:
        """Run until the job ends; fail after `max_events` events or `max_s` virtual seconds."""
        return super().run(max_events, max_s)

    def did(self, kind: type[SomeAction]) -> list[tuple[float, SomeAction]]:
        """Return the coordinator's actions of one kind, each with its virtual time."""
        return [(at, action) for at, action in self.actions if isinstance(action, kind)]
