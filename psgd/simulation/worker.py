"""A worker on a virtual clock: as `psgd_workers.worker.Worker` works, but for what it computes with and how it waits.

With a pipeline of p it has p + 1 slots, which its batches use in rotation. A slot's push is answered with new weights
for the slot's next batch; meanwhile the worker computes in the others, and it waits only for the slot it comes to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import hypot
from typing import Any, NamedTuple, Protocol

import numpy as np

from psgd.core.driver.events import Evaluated, Event, LaneFailed, LeaseClosed, WorkerFailed
from psgd.errors import WorkerError
from psgd.simulation.problem import Problem, Timing
from psgd_workers.gradients.sender import Sender, gradient_norm
from psgd_workers.messages import BatchId, FloatArray, Gradient, Lease, Receipt, Version
from psgd_workers.spec import WorkerOptions

__all__ = ["Readers", "Site", "Slot", "Validation", "VirtualWorker"]


class Site(Protocol):
    """What surrounds a worker."""

    now: float
    problem: Problem
    timing: Timing
    compute_s: Callable[[str, BatchId], float]  # (worker, batch) -> virtual seconds of one gradient
    parts: Sequence[slice]  # of the weights, by partition
    readers: Readers | None  # None: no computation is called off

    def at(self, time_s: float, happen: Callable[..., None], *arguments: Any) -> None:
        """Let something happen at an instant."""

    def tell_soon(self, event: Event) -> None:
        """Let the driver hear of something."""

    def pull(self, worker: str) -> tuple[list[Version], FloatArray] | None:
        """Versions, by partition, and the weights shown now: perhaps memory that the next step changes.

        None: some server does not answer that worker.
        """

    def push(self, worker: VirtualWorker, slot: Slot, gradients: Sequence[Gradient]) -> None:
        """A worker's gradient reaches the servers."""


class Readers:
    """Who computes from which version of the first partition, for a job that calls off what would be refused.

    Args:
        stop_at: the staleness at which it would be.
    """

    def __init__(self, stop_at: int) -> None:
        self._stop_at = stop_at
        self._at: dict[int, list[tuple[VirtualWorker, int]]] = {}

    def add(self, read: Version, worker: VirtualWorker, turn: int) -> None:
        """A worker begins its computation of that number."""
        self._at.setdefault(read.updates, []).append((worker, turn))

    def call_off(self, updates: int) -> None:
        """The partition came to a version: whoever computes from too old a one starts over with the next batch."""
        for version in [version for version in self._at if version <= updates - self._stop_at]:
            for worker, turn in self._at.pop(version):
                worker.call_off(turn)


class Validation(NamedTuple):
    """Weights to evaluate."""

    epochs: int | None  # their name
    weights: FloatArray  # [num_parameters]


@dataclass(slots=True, eq=False)
class Slot:
    """What one batch at a time is computed in and pushed from."""

    sender: Sender
    batch: BatchId | None = None  # pushed; not every partition has answered
    outcomes: list[Any] = field(default_factory=list)  # of that push, by partition; None: not yet known
    reads: list[Version] = field(default_factory=list)  # what its weights are, by partition; empty: it has to pull
    weights: FloatArray | None = None  # [num_parameters], received for its next batch; None: those shown when it begins
    ready_at: float = 0.0  # when they have come

    def clear(self) -> None:
        """Forget the weights."""
        self.reads = []
        self.weights = None


class VirtualWorker:
    """A worker process.

    Args:
        name: unique in the run.
        site: where it works.
        rules: what the job wants beyond gradients.
        pipeline: batches it computes ahead of the oldest push that is not answered.

    Attributes:
        alive: false once it was killed.
        cancelled: it begins no more batches of leases up to this one.
        slots: in the order of their use.
        lease: at work; None: nothing is.
        pushes: so far.
    """

    def __init__(self, name: str, site: Site, worker_options: WorkerOptions, pipeline: int) -> None:
        self.name = name
        self.alive = True
        self.cancelled = -1  # leases up to this one are
        self._trainable = site.problem.trainable
        self.slots = [
            Slot(Sender(name, slot, site.parts, self._trainable, worker_options)) for slot in range(pipeline + 1)
        ]
        self.lease: int | None = None
        self.pushes = 0
        self._site = site
        self._problem = site.problem
        self._link_s = site.timing.link_s
        self._sends_weights = worker_options.sends_weights
        self._tasks: deque[Lease | Validation] = deque()
        self._busy = False
        self._batches: deque[BatchId] = deque()
        self._computing: Slot | None = None
        self._next = self.slots[0]  # to begin a batch in
        self._turn = 0  # computations so far
        self._first = 0  # ... when the lease began

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
        site = self._site
        if isinstance(task, Lease):
            grid = self._problem.grid
            self.lease = task.id
            self._first = self._turn
            self._next = self.slots[0]
            self._batches = deque(grid.batch(epoch, position) for epoch, position in task.positions())
            self._go_on()
        else:
            site.at(site.now + site.timing.evaluate_s, self._validate, task)

    def _validate(self, task: Validation) -> None:
        evaluate = self._problem.evaluate
        assert evaluate
        if self.alive:
            self._site.tell_soon(Evaluated(self.name, task.epochs, evaluate(task.weights)))
            self.next_task()

    # Batches

    def _go_on(self) -> None:
        """Begin the next batch, or end the lease; or wait: for the next slot's answer, at the end for every slot's."""
        if self.lease is None or not self.alive:
            return
        if self._batches and self.lease > self.cancelled:
            if self._next.batch is None:
                self._begin(self._next, self._batches.popleft())
        elif all(slot.batch is None for slot in self.slots):
            self._close(self.lease)

    def _close(self, lease: int) -> None:
        for slot in self.slots:
            slot.clear()
        self.lease = None
        residual_norm = hypot(*(slot.sender.residual_norm for slot in self.slots))
        self._site.tell_soon(LeaseClosed(self.name, lease, residual_norm))
        self.next_task()

    def _begin(self, slot: Slot, batch: BatchId) -> None:
        """Compute; the result is pushed when its time has passed."""
        site = self._site
        problem = self._problem
        weights = slot.weights
        if weights is None:
            pulled = site.pull(self.name)
            if pulled is None:
                self.lose_lane("no weights came")
                return
            slot.reads, weights = pulled
            slot.ready_at = site.now + self._link_s
            if self._sends_weights:
                weights = weights.copy()  # the server goes on to step in place
        slot.weights = None
        values = np.empty_like(problem.weights)
        try:
            loss = problem.gradient(batch, weights, values)
        except WorkerError as error:
            self.lease = None
            site.tell_soon(WorkerFailed(self.name, str(error)))
            return
        seconds = site.compute_s(self.name, batch)
        self._turn += 1
        self._computing, self._next = slot, self.slots[(self._turn - self._first) % len(self.slots)]
        if site.readers:
            site.readers.add(slot.reads[0], self, self._turn)
        site.at(
            max(site.now, slot.ready_at) + seconds, self._computed, self._turn, batch, values, weights, loss, seconds
        )

    def _computed(
        self, turn: int, batch: BatchId, values: FloatArray, weights: FloatArray, loss: float, seconds: float
    ) -> None:
        """`weights` may be the server's own memory, unless the job sends what was read."""
        slot = self._computing
        site = self._site
        if not self.alive or slot is None or turn != self._turn:
            return
        examples = self._problem.examples(batch)
        norm = gradient_norm(values, self._trainable)
        gradients = slot.sender.gradients(batch, examples, slot.reads, values, weights, loss, norm, seconds)
        self.pushes += 1
        slot.batch = batch
        slot.outcomes = [None] * len(gradients)
        self._computing = None
        if self._link_s:
            site.at(site.now + self._link_s, self._arrive, slot, gradients)
        else:
            site.push(self, slot, gradients)
        if self._computing is None:  # else the answer came at once
            self._go_on()

    def _arrive(self, slot: Slot, gradients: Sequence[Gradient]) -> None:
        if self.alive and slot.batch == gradients[0].batch:  # else it is lost on the way
            self._site.push(self, slot, gradients)

    def lose_lane(self, cause: str) -> None:
        """A server does not answer: the lease ends here, what is under way is in doubt, and the next one begins."""
        if self.lease is None or not self.alive:
            return
        for slot in self.slots:
            if slot.batch is not None:
                answered = slot.outcomes[: slot.outcomes.index(None)] if None in slot.outcomes else slot.outcomes
                slot.sender.settle(answered)
                slot.batch = None
            slot.clear()
        self._computing = None
        lease, self.lease = self.lease, None
        self._site.tell_soon(LaneFailed(self.name, lease, cause))
        self.next_task()

    def call_off(self, turn: int) -> None:
        """Give up the computation of that number, if it is under way, and begin the next batch."""
        if self.alive and self._computing is not None and turn == self._turn:
            self._computing.clear()
            self._computing = None
            self._go_on()

    def receive(self, partition: int, receipt: Receipt, shown: FloatArray) -> None:
        """A server answers a push.

        Args:
            partition: which server.
            receipt: its answer.
            shown: its weights, `[partition size]`.
        """
        for slot in self.slots:
            if slot.batch == receipt.batch:
                break
        else:
            return  # of a push that was given up
        outcomes = slot.outcomes
        if outcomes[partition] is not None:
            return
        outcomes[partition] = receipt.outcome
        if len(outcomes) > 1 or self._computing is not None or slot is not self._next:
            slot.reads[partition] = receipt.version
            if slot.weights is None:
                slot.weights = np.empty_like(self._problem.weights)
            slot.weights[self._site.parts[partition]] = shown
        # else the slot's next batch begins at this instant, from what is shown
        if None in outcomes or not self.alive:
            return
        slot.batch = None
        slot.sender.settle(outcomes)
        slot.ready_at = self._site.now + self._link_s
        if self._computing is None:
            self._go_on()
