"""A worker on a virtual clock. It hosts the loop of `psgd_workers.loop`, as `psgd_workers.worker.Worker` does on Ray.

A gradient is computed at the virtual time at which its computation begins. Its result is used when the worker's
compute time has passed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from math import hypot
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from psgd.core.driver.events import Evaluated, Event, LaneFailed, LeaseClosed, WorkerFailed
from psgd.errors import WorkerError
from psgd.simulation.problem import Problem, Timing
from psgd_workers.gradients.sender import Sender, gradient_norm
from psgd_workers.loop import (
    Compute,
    ComputeAborted,
    Computed,
    EndLease,
    LeaseCancelled,
    LeaseFailed,
    LeaseGranted,
    LoopAction,
    LoopEvent,
    PipelineSlot,
    Pull,
    Pulled,
    Push,
    Pushed,
    ReceiptArrived,
    Settle,
    WorkerLoop,
)
from psgd_workers.messages import BatchId, FloatArray, Gradient, Lease, Receipt, Version
from psgd_workers.spec import WorkerOptions

if TYPE_CHECKING:
    from psgd.simulation.network import Network

__all__ = ["RunningComputations", "Validation", "VirtualWorker", "WorkerEnvironment"]

COMPUTED = Computed()
PUSHED = Pushed()


class WorkerEnvironment(Protocol):
    """The part of a virtual cluster that a worker uses."""

    now: float  # virtual seconds
    problem: Problem
    timing: Timing
    network: Network
    compute_s: Callable[[str, BatchId], float]  # (worker, batch) -> virtual seconds of one gradient
    parts: Sequence[slice]  # each partition's slice of the weights
    computations: RunningComputations | None  # None: no computation is interrupted

    def at(self, time_s: float, callback: Callable[..., None], *arguments: Any) -> None:
        """Schedule a callback for `time_s`, in virtual seconds."""

    def tell_soon(self, event: Event) -> None:
        """Send an event to the driver."""


class RunningComputations:
    """Computations under way, which are interrupted as soon as their gradients would be refused as too stale.

    Published analyses assume this. A real worker compares versions only when a computation ends.

    Args:
        stop_at: smallest staleness, in versions of the first partition, at which a gradient is refused.
    """

    def __init__(self, stop_at: int) -> None:
        self._stop_at = stop_at
        self._by_version: dict[int, list[tuple[VirtualWorker, int]]] = {}  # updates read -> (worker, computation)

    def add(self, read: Version, worker: VirtualWorker, computation: int) -> None:
        """Note that a worker begins a computation.

        Args:
            read: version of the first partition that it uses.
            worker: the worker.
            computation: number of the computation among those of the worker.
        """
        self._by_version.setdefault(read.updates, []).append((worker, computation))

    def call_off_stale(self, updates: int) -> None:
        """Call off the computations that are too stale now that the first partition has made `updates` updates."""
        for version in [version for version in self._by_version if version <= updates - self._stop_at]:
            for worker, computation in self._by_version.pop(version):
                worker.call_off(computation)


class Validation(NamedTuple):
    """Weights to evaluate."""

    epochs: int | None  # complete epochs in the weights, which name them
    weights: FloatArray  # [num_parameters]


class VirtualWorker:
    """A worker process on a virtual clock.

    Args:
        name: name of the worker, unique in the run.
        environment: cluster in which it works.
        worker_options: parts of the job that a worker needs besides its batches.
        pipeline: number of batches to compute ahead of the oldest push that is not answered.

    Attributes:
        alive: False once the worker was killed or hangs.
        slots: slots of the pipeline, in the order of their use.
        pushes: number of pushes so far.
        lane: number of its present lanes to the servers; higher after each loss.
    """

    def __init__(self, name: str, environment: WorkerEnvironment, worker_options: WorkerOptions, pipeline: int) -> None:
        self.name = name
        self.alive = True
        self.pushes = 0
        self.lane = 0
        self._environment = environment
        self._network = environment.network
        self._problem = environment.problem
        self._size = len(environment.problem.weights)
        self._link_s = environment.timing.link_s
        self._trainable = environment.problem.trainable
        self._worker_options = worker_options
        self._loop = WorkerLoop(len(environment.parts), pipeline, worker_options.stop_at)
        self.slots = self._loop.slots
        self._senders = [
            Sender(name, slot.number, environment.parts, self._trainable, worker_options) for slot in self.slots
        ]
        self._weights: list[FloatArray | None] = [None] * len(self.slots)  # weights for the next batch, by slot
        self._ready_at = [0.0] * len(self.slots)  # virtual time at which those weights have arrived, by slot
        self._tasks: deque[Lease | Validation] = deque()
        self._busy = False
        self._computations = 0  # number of computations begun so far
        # Results of the last one, which are used when its time has passed. Unless the job sends the weights with the
        # gradient, they may be the server's own memory, which its next step changes.
        self._gradient = self._read = np.empty(0, np.float32)  # [num_parameters], and weights that it was computed from
        self._norm = 0.0
        self._loss = 0.0
        self._compute_s = 0.0

    @property
    def lease(self) -> int | None:
        """Number of the lease at work, or None."""
        return self._loop.lease

    # Tasks

    def queue(self, task: Lease | Validation) -> None:
        """Append a task to the queue, and begin it if the worker is idle."""
        self._tasks.append(task)
        if not self._busy:
            self.next_task()

    def next_task(self) -> None:
        """Begin the next lease or evaluation, if one is queued."""
        self._busy = self.alive and bool(self._tasks)
        if not self._busy:
            return
        task = self._tasks.popleft()
        if isinstance(task, Lease):
            batches = [self._problem.grid.batch(epoch, position) for epoch, position in task.positions()]
            self._handle(LeaseGranted(task.id, batches))
        else:
            self._environment.at(self._environment.now + self._environment.timing.evaluate_s, self._validate, task)

    def _validate(self, task: Validation) -> None:
        evaluate = self._problem.evaluate
        assert evaluate
        if self.alive:
            self._environment.tell_soon(Evaluated(self.name, task.epochs, evaluate(task.weights)))
            self.next_task()

    def cancel(self, lease: int) -> None:
        """Begin no further batch of this lease or of an earlier one."""
        self._handle(LeaseCancelled(lease))

    # Batches

    def _handle(self, event: LoopEvent) -> None:
        self._perform(self._loop.handle(event))

    def _perform(self, actions: Sequence[LoopAction]) -> None:
        for action in actions:
            match action:
                case Settle():
                    self._senders[action.slot].settle(action.outcomes)
                case Compute():
                    self._compute(action.slot, action.batch)
                case Push():
                    self._push(action.slot, action.batch)
                case Pull():
                    self._pull(action.slot)
                case EndLease():
                    self._end(action.lease)

    def _end(self, lease: int) -> None:
        residual_norm = hypot(*(sender.residual_norm for sender in self._senders))
        self._environment.tell_soon(LeaseClosed(self.name, lease, residual_norm))
        self.next_task()

    def _pull(self, slot: int) -> None:
        pulled = self._network.pull(self.name)
        if pulled is None:
            self.lose_lane("no weights came")
            return
        reads, weights = pulled
        # The server's next step changes its memory in place.
        self._weights[slot] = weights.copy() if self._worker_options.sends_weights else weights
        self._ready_at[slot] = self._environment.now + self._link_s
        self._handle(Pulled(reads))

    def _compute(self, slot: int, batch: BatchId) -> None:
        """Compute a gradient now, and schedule its end for when the compute time has passed."""
        environment = self._environment
        weights = self._weights[slot]
        assert weights is not None
        self._weights[slot] = None
        self._read = weights
        self._gradient = np.empty(self._size, np.float32)  # a message that is late may still hold the last one
        try:
            self._loss = self._problem.gradient(batch, weights, self._gradient)
        except WorkerError as error:
            self._handle(LeaseFailed())
            environment.tell_soon(WorkerFailed(self.name, str(error)))
            return
        self._norm = gradient_norm(self._gradient, self._trainable)
        seconds = self._compute_s = environment.compute_s(self.name, batch)
        self._computations += 1
        if environment.computations:
            environment.computations.add(self.slots[slot].reads[0], self, self._computations)
        environment.at(max(environment.now, self._ready_at[slot]) + seconds, self._finish, self._computations)

    def _is_computing(self, computation: int) -> bool:
        return self.alive and self._loop.computing is not None and computation == self._computations

    def _finish(self, computation: int) -> None:
        if not self._is_computing(computation):
            return
        if self._worker_options.stop_at is None:
            self._perform(self._loop.handle(COMPUTED))
        elif versions := self._network.versions(self.name):
            self._handle(Computed(versions))
        else:
            self.lose_lane("no version came")

    def _push(self, slot: int, batch: BatchId) -> None:
        pipeline_slot = self.slots[slot]
        examples = self._problem.grid.examples(batch)
        gradients = self._senders[slot].gradients(
            batch,
            examples,
            pipeline_slot.reads,
            self._gradient,
            self._read,
            self._loss,
            self._norm,
            self._compute_s,
        )
        self.pushes += 1
        if self._link_s:
            self._environment.at(self._environment.now + self._link_s, self._arrive, pipeline_slot, gradients)
        else:
            self._network.push(self, pipeline_slot, gradients)
        # The fault plan may have killed the worker during the push. Or the receipt has come, and the next batch begun.
        if self.alive and self._loop.computing is None:
            self._perform(self._loop.handle(PUSHED))

    def _arrive(self, slot: PipelineSlot, gradients: Sequence[Gradient]) -> None:
        if self.alive and slot.batch == gradients[0].batch:  # else the push is lost
            self._network.push(self, slot, gradients)

    def lose_lane(self, cause: str) -> None:
        """End the lease because a server does not answer, and begin the next task.

        The batches whose pushes are under way are in doubt.
        """
        lease = self.lease
        if lease is None or not self.alive:
            return
        self.lane += 1
        self._handle(LeaseFailed())
        self._environment.tell_soon(LaneFailed(self.name, lease, cause))
        self.next_task()

    def call_off(self, computation: int) -> None:
        """Abort the computation with this number if it is still under way, and begin the next batch."""
        if self._is_computing(computation):
            self._handle(ComputeAborted())

    def receive(self, partition: int, receipt: Receipt, published: FloatArray, lane: int) -> None:
        """Take a server's receipt of a push.

        Args:
            partition: partition of the server.
            receipt: the receipt.
            published: weights that came with it, `[partition size]`.
            lane: number of the lane that carried the push. Nothing arrives by a lane that was lost.
        """
        if lane != self.lane:
            return
        slot = self._loop.slot_of_push(receipt.batch)
        if slot is None or slot.outcomes[partition] is not None or not self.alive:
            return  # the push was abandoned, or this is a second receipt
        actions = self._loop.handle(ReceiptArrived(partition, receipt))
        if slot.wants:
            self._keep_weights(slot, partition, published)
        self._perform(actions)

    def _keep_weights(self, slot: PipelineSlot, partition: int, published: FloatArray) -> None:
        """Keep the weights that came with a receipt, for the slot's next batch."""
        self._ready_at[slot.number] = self._environment.now + self._link_s
        if (
            slot is self._loop.computing
            and len(self._environment.parts) == 1
            and not self._worker_options.sends_weights
        ):
            self._weights[slot.number] = published  # the batch is computed at this virtual time: no copy is needed
            return
        weights = self._weights[slot.number]
        if weights is None:
            weights = self._weights[slot.number] = np.empty_like(self._problem.weights)
        weights[self._environment.parts[partition]] = published
