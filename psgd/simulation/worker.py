"""A worker on a virtual clock: hosts the loop of `psgd_workers.loop`, as `psgd_workers.worker.Worker` does for real.

A gradient is computed at the instant its computation begins, and is there when the worker's compute time has passed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from math import hypot
from typing import Any, NamedTuple, Protocol

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

__all__ = ["Readers", "Site", "Validation", "VirtualWorker"]


class Site(Protocol):
    """What surrounds a worker."""

    now: float
    problem: Problem
    timing: Timing
    compute_s: Callable[[str, BatchId], float]  # (worker, batch) -> virtual seconds of one gradient
    parts: Sequence[slice]  # of the weights, by partition
    readers: Readers | None  # None: no computation is interrupted

    def at(self, time_s: float, happen: Callable[..., None], *arguments: Any) -> None:
        """Let something happen at an instant."""

    def tell_soon(self, event: Event) -> None:
        """Let the driver hear of something."""

    def versions(self, worker: str) -> list[Version] | None:
        """Versions now, by partition. None: some server does not answer that worker."""

    def pull(self, worker: str) -> tuple[list[Version], FloatArray] | None:
        """Versions, by partition, and the weights shown now: perhaps memory that the next step changes.

        None: some server does not answer that worker.
        """

    def push(self, worker: VirtualWorker, slot: PipelineSlot, gradients: Sequence[Gradient]) -> None:
        """A worker's gradient reaches the servers."""


class Readers:
    """Computations under way, by the version of the first partition that they read: to interrupt what would be refused.

    A real worker looks when a computation is done. This is what published analyses assume.

    Args:
        stop_at: staleness from which on a gradient would be refused.
    """

    def __init__(self, stop_at: int) -> None:
        self._stop_at = stop_at
        self._at: dict[int, list[tuple[VirtualWorker, int]]] = {}

    def add(self, read: Version, worker: VirtualWorker, turn: int) -> None:
        """A worker begins its computation of that number."""
        self._at.setdefault(read.updates, []).append((worker, turn))

    def call_off(self, updates: int) -> None:
        """The partition came to a version: workers that compute from too old a one start over with the next batch."""
        for version in [version for version in self._at if version <= updates - self._stop_at]:
            for worker, turn in self._at.pop(version):
                worker.call_off(turn)


class Validation(NamedTuple):
    """Weights to evaluate."""

    epochs: int | None  # their name
    weights: FloatArray  # [num_parameters]


class _Backpropagated(NamedTuple):
    """Result of a computation.

    `weights` may be the server's own memory, which its next step changes, unless the job sends them with the gradient.
    """

    values: FloatArray  # [num_parameters], the gradient
    weights: FloatArray  # [num_parameters], read by it
    loss: float
    compute_s: float


class VirtualWorker:
    """A worker process.

    Args:
        name: unique in the run.
        site: where it works.
        rules: what the job wants beyond gradients.
        pipeline: batches it computes ahead of the oldest push that is not answered.

    Attributes:
        alive: false once it was killed.
        slots: in the order of their use.
        pushes: so far.
    """

    def __init__(self, name: str, site: Site, worker_options: WorkerOptions, pipeline: int) -> None:
        self.name = name
        self.alive = True
        self.pushes = 0
        self._site = site
        self._problem = site.problem
        self._link_s = site.timing.link_s
        self._trainable = site.problem.trainable
        self._worker_options = worker_options
        self._loop = WorkerLoop(len(site.parts), pipeline, worker_options.stop_at)
        self.slots = self._loop.slots
        self._senders = [Sender(name, slot.number, site.parts, self._trainable, worker_options) for slot in self.slots]
        self._weights: list[FloatArray | None] = [None] * len(self.slots)  # for the next batch, by slot
        self._ready_at = [0.0] * len(self.slots)  # when those have come
        self._tasks: deque[Lease | Validation] = deque()
        self._busy = False
        self._turn = 0  # computations so far
        self._computed: _Backpropagated | None = None  # the last one's result

    @property
    def lease(self) -> int | None:
        """Lease at work, or None."""
        return self._loop.lease

    # Tasks

    def queue(self, task: Lease | Validation) -> None:
        """Do this once everything before it is done."""
        self._tasks.append(task)
        if not self._busy:
            self.next_task()

    def next_task(self) -> None:
        """Go on with the next lease or evaluation, if there is one."""
        self._busy = self.alive and bool(self._tasks)
        if not self._busy:
            return
        task = self._tasks.popleft()
        if isinstance(task, Lease):
            batches = [self._problem.grid.batch(epoch, position) for epoch, position in task.positions()]
            self._handle(LeaseGranted(task.id, batches))
        else:
            self._site.at(self._site.now + self._site.timing.evaluate_s, self._validate, task)

    def _validate(self, task: Validation) -> None:
        evaluate = self._problem.evaluate
        assert evaluate
        if self.alive:
            self._site.tell_soon(Evaluated(self.name, task.epochs, evaluate(task.weights)))
            self.next_task()

    def cancel(self, lease: int) -> None:
        """Begin no more batches of leases up to this one."""
        self._handle(LeaseCancelled(lease))

    # Batches

    def _handle(self, event: LoopEvent) -> None:
        self._carry_out(self._loop.handle(event))

    def _carry_out(self, actions: Sequence[LoopAction]) -> None:
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
        self._site.tell_soon(LeaseClosed(self.name, lease, residual_norm))
        self.next_task()

    def _pull(self, slot: int) -> None:
        pulled = self._site.pull(self.name)
        if pulled is None:
            self.lose_lane("no weights came")
            return
        reads, weights = pulled
        # The server goes on to step in place.
        self._weights[slot] = weights.copy() if self._worker_options.sends_weights else weights
        self._ready_at[slot] = self._site.now + self._link_s
        self._handle(Pulled(reads))

    def _compute(self, slot: int, batch: BatchId) -> None:
        """Compute; the result is there when its time has passed."""
        site = self._site
        weights = self._weights[slot]
        assert weights is not None
        self._weights[slot] = None
        values = np.empty_like(self._problem.weights)
        try:
            loss = self._problem.gradient(batch, weights, values)
        except WorkerError as error:
            self._handle(LeaseFailed())
            site.tell_soon(WorkerFailed(self.name, str(error)))
            return
        seconds = site.compute_s(self.name, batch)
        self._turn += 1
        if site.readers:
            site.readers.add(self.slots[slot].reads[0], self, self._turn)
        result = _Backpropagated(values, weights, loss, seconds)
        site.at(max(site.now, self._ready_at[slot]) + seconds, self._finish, self._turn, result)

    def _is_computing(self, turn: int) -> bool:
        return self.alive and self._loop.computing is not None and turn == self._turn

    def _finish(self, turn: int, result: _Backpropagated) -> None:
        if not self._is_computing(turn):
            return
        self._computed = result
        if self._worker_options.stop_at is None:
            self._handle(Computed())
        elif versions := self._site.versions(self.name):
            self._handle(Computed(versions))
        else:
            self.lose_lane("no version came")

    def _push(self, slot: int, batch: BatchId) -> None:
        assert self._computed
        place = self.slots[slot]
        values, weights, loss, seconds = self._computed
        examples = self._problem.examples(batch)
        norm = gradient_norm(values, self._trainable)
        gradients = self._senders[slot].gradients(batch, examples, place.reads, values, weights, loss, norm, seconds)
        self.pushes += 1
        if self._link_s:
            self._site.at(self._site.now + self._link_s, self._arrive, place, gradients)
        else:
            self._site.push(self, place, gradients)
        if self.alive:  # the push may have been its last act
            self._handle(Pushed())  # the answer, and the next batch, may have come before

    def _arrive(self, slot: PipelineSlot, gradients: Sequence[Gradient]) -> None:
        if self.alive and slot.batch == gradients[0].batch:  # else it is lost on the way
            self._site.push(self, slot, gradients)

    def lose_lane(self, cause: str) -> None:
        """A server does not answer: the lease ends here, what is under way is in doubt, and the next one begins."""
        lease = self.lease
        if lease is None or not self.alive:
            return
        self._handle(LeaseFailed())
        self._site.tell_soon(LaneFailed(self.name, lease, cause))
        self.next_task()

    def call_off(self, turn: int) -> None:
        """Give up the computation of that number, if it is under way, and begin the next batch."""
        if self._is_computing(turn):
            self._handle(ComputeAborted())

    def receive(self, partition: int, receipt: Receipt, shown: FloatArray) -> None:
        """A server answers a push.

        Args:
            partition: which server.
            receipt: its answer.
            shown: its weights, `[partition size]`.
        """
        slot = self._loop.slot_of_push(receipt.batch)
        if slot is None or slot.outcomes[partition] is not None or not self.alive:
            return  # of a push that was given up, or answered before
        actions = self._loop.handle(ReceiptArrived(partition, receipt))
        if slot.wants:
            self._keep(slot, partition, shown)
        self._carry_out(actions)

    def _keep(self, slot: PipelineSlot, partition: int, shown: FloatArray) -> None:
        """Weights came with a receipt, for the slot's next batch."""
        self._ready_at[slot.number] = self._site.now + self._link_s
        if slot is self._loop.computing and len(self._site.parts) == 1 and not self._worker_options.sends_weights:
            self._weights[slot.number] = shown  # that batch is computed at this instant: no copy is needed
            return
        weights = self._weights[slot.number]
        if weights is None:
            weights = self._weights[slot.number] = np.empty_like(self._problem.weights)
        weights[self._site.parts[partition]] = shown
