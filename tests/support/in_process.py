"""Whole jobs on the production core, in one thread and on a virtual clock: no Ray, no disk, no sleeping.

`InProcess` is the simulator's cluster, with failures scripted by (worker, push), and what happened written down.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self, TypeVar

from psgd.core.driver.events import Action, Commit, Save, SaveFailed, WorkerLost
from psgd.simulation.cluster import VirtualCheckpoint, VirtualCluster
from psgd.simulation.problem import Problem, Timing
from psgd.simulation.worker import Slot, VirtualWorker
from psgd.spec import JobSpec
from psgd_workers.messages import BatchId, EpochGrid, Evaluation, FloatArray, Gradient, Outcome, Receipt, Version

__all__ = ["Applied", "Fault", "InProcess", "VirtualCheckpoint"]

TIMING = Timing()
START_S = TIMING.start_s
EVALUATE_S = TIMING.evaluate_s
LATE_S = 0.5  # a late push arrives so long after its worker's death
MAX_EVENTS = 50_000

Kind = TypeVar("Kind", bound=Action)

FaultKind = Literal["before", "after", "late", "torn", "silent", "lane"]


class Fault(NamedTuple):
    """What befalls a worker's n-th push.

    The worker dies before it, after it reached the servers but before its receipt, with the push still under way
    (`late`), or when it reached the first server only (`torn`). A `silent` worker hangs instead of pushing; `lane`:
    the push arrives, its receipt does not, and the worker lives.
    """

    worker: str
    push: int  # from 0
    kind: FaultKind


class Applied(NamedTuple):
    """One gradient in the first partition's weights."""

    worker: str
    batch: BatchId
    read: Version
    after: Version


def _constant_s(worker: str, batch: BatchId) -> float:
    return 0.05


class InProcess(VirtualCluster):
    """One run.

    Args:
        spec: the job; its model and data are not looked at.
        grid: the shape of an epoch.
        weights: `[num_parameters]`, initial; without buffers.
        gradient: (batch, weights, out) -> loss, as `psgd_workers.worker.Worker.gradient`.
        examples: in a batch.
        compute_s: (worker, batch) -> virtual seconds of one gradient.
        start_s: worker -> virtual seconds its process takes to start; infinite: for ever.
        evaluate: weights -> result; None: there is nothing to validate on.
        faults: what befalls the workers.
        failing_saves: numbers of the checkpoints that cannot be written.
        options: of the cluster.

    Attributes:
        applied: what is in the first partition's weights, in order, of this process.
        checkpoints: committed ones, oldest first.
        actions: (virtual time, action) for everything the coordinator wanted.
    """

    def __init__(
        self,
        spec: JobSpec,
        grid: EpochGrid,
        weights: FloatArray,
        gradient: Callable[[BatchId, FloatArray, FloatArray], float],
        *,
        examples: Callable[[BatchId], int] = lambda batch: 1,
        compute_s: Callable[[str, BatchId], float] = _constant_s,
        start_s: Callable[[str], float] = lambda worker: START_S,
        evaluate: Callable[[FloatArray], Evaluation] | None = None,
        faults: Sequence[Fault] = (),
        failing_saves: Collection[int] = (),
        **options: Any,
    ) -> None:
        problem = Problem(grid, weights, gradient, examples=examples, evaluate=evaluate)
        super().__init__(spec, problem, compute_s, **options)
        self._start_s = start_s
        self._faults: Mapping[tuple[str, int], FaultKind] = {(f.worker, f.push): f.kind for f in faults}
        self._failing_saves = failing_saves
        self._reads: dict[tuple[str, BatchId], Version] = {}
        self.applied: list[Applied] = []
        self.checkpoints: list[VirtualCheckpoint] = []
        self.actions: list[tuple[float, Action]] = []

    def run(self, max_events: int = MAX_EVENTS) -> Self:
        """Run to the end, which must not be far."""
        return super().run(max_events)

    def did(self, kind: type[Kind]) -> list[tuple[float, Kind]]:
        """When the coordinator wanted which actions of one kind."""
        return [(at, action) for at, action in self.actions if isinstance(action, kind)]

    def start_s(self, worker: str) -> float:
        return self._start_s(worker)

    def act(self, action: Action) -> None:
        self.actions.append((self.now, action))
        if isinstance(action, Save) and action.checkpoint in self._failing_saves:
            self.tell_soon(SaveFailed(action.checkpoint, "the disk is full"))
            return
        super().act(action)
        if isinstance(action, Commit) and self.checkpoint:
            self.checkpoints.append(self.checkpoint)

    def arrive(self, gradients: Sequence[Gradient], first: int = 0) -> bool:
        if first == 0:
            self._reads[gradients[0].worker, gradients[0].batch] = gradients[0].read
        return super().arrive(gradients, first)

    def _deliver(self, partition: int, receipts: tuple[Receipt, ...]) -> None:
        for receipt in receipts:
            if partition == 0 and receipt.outcome is Outcome.APPLIED:
                read = self._reads[receipt.worker, receipt.batch]
                self.applied.append(Applied(receipt.worker, receipt.batch, read, receipt.version))
        super()._deliver(partition, receipts)

    def push(self, worker: VirtualWorker, slot: Slot, gradients: Sequence[Gradient]) -> None:
        fault = self._faults.get((worker.name, worker.pushes - 1))
        if fault is None:
            super().push(worker, slot, gradients)
            return
        if fault == "silent":
            worker.lease = None
            return
        if fault == "lane":
            worker.lose_lane("no receipt came")
        else:
            worker.alive = False
            self.tell_soon(WorkerLost(worker.name, fault), TIMING.death_s)
        if fault == "late":
            self.after(LATE_S, self._arrive_late, gradients)
        elif fault != "before":
            self.arrive(gradients[:1] if fault == "torn" else gradients)

    def _arrive_late(self, gradients: Sequence[Gradient]) -> None:
        self.arrive(gradients)
