"""Whole jobs on the production core, in one thread and on a virtual clock: no Ray, no disk, no sleeping.

`InProcess` does what `psgd.cluster` does for the coordinator, its servers and its workers, but everything happens on a
heap of (time, number, event), so that a run is a function of its arguments. Failures are scripted by (worker, push).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, singledispatchmethod
from heapq import heappop, heappush
from itertools import count
from typing import Literal, NamedTuple, Self, TypeVar

import numpy as np

from psgd.core.coordinator import Coordinator
from psgd.core.events import (
    Action,
    AskReport,
    Cancel,
    Commit,
    Committed,
    Evaluate,
    Evaluated,
    Event,
    Finish,
    Grant,
    Join,
    LaneFailed,
    LeaseClosed,
    Leave,
    Reported,
    Save,
    Saved,
    SaveFailed,
    Started,
    StartServer,
    StartWorker,
    StopWorker,
    Tick,
    WorkerFailed,
    WorkerLost,
    WorkerUp,
)
from psgd.core.server import ParameterServer, Partition, ServerState
from psgd.spec import JobSpec
from psgd_workers.errors import WorkerError
from psgd_workers.messages import (
    BatchId,
    EpochGrid,
    Evaluation,
    FloatArray,
    Gradient,
    Lease,
    Outcome,
    Receipt,
    Version,
)

__all__ = ["Applied", "Checkpoint", "Fault", "InProcess"]

CALL_S = 0.001  # of every message between the driver and an actor
START_S = 1.0  # of a process
POLL_S = 0.2  # a waiting report is given after this time at the latest
DEATH_S = 0.05  # until the driver hears of a death
LATE_S = 0.5  # a late push arrives so long after its worker's death
EVALUATE_S = 0.1
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


class Checkpoint(NamedTuple):
    """A committed checkpoint."""

    states: tuple[ServerState, ...]  # by partition
    number: int
    updates: int
    requeued: int


class _Validation(NamedTuple):
    epochs: int | None
    weights: FloatArray


@dataclass(slots=True)
class _Worker:
    name: str
    alive: bool = True
    cancelled: bool = False
    tasks: deque[Lease | _Validation] = field(default_factory=deque)
    busy: bool = False
    lease: int = -1
    batches: deque[BatchId] = field(default_factory=deque)
    pushes: int = 0
    awaited: set[tuple[int, BatchId]] = field(default_factory=set)  # receipts: (partition, batch)


def _constant_s(worker: str, batch: BatchId) -> float:
    return 0.05


class InProcess:
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
        events: (virtual time, event) each, told to the coordinator besides what happens by itself.
        failing_saves: numbers of the checkpoints that cannot be written.
        resume: the checkpoint to continue from.
        partitions: servers.
        observe: called after every event.

    Attributes:
        now: virtual seconds.
        applied: what is in the first partition's weights, in order, of this process.
        computing: worker -> version that the gradient in its hands was read from.
        checkpoints: committed ones, oldest first.
        actions: (virtual time, action) for everything the coordinator wanted.
        finish: how it ended.
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
        events: Sequence[tuple[float, Event]] = (),
        failing_saves: Collection[int] = (),
        resume: Checkpoint | None = None,
        partitions: int = 1,
        observe: Callable[[InProcess], None] = lambda host: None,
    ) -> None:
        self._spec = spec
        self._grid = grid
        self._initial = weights
        self._gradient = gradient
        self._examples = examples
        self._compute_s = compute_s
        self._start_s = start_s
        self._evaluate = evaluate
        self._faults: Mapping[tuple[str, int], FaultKind] = {(f.worker, f.push): f.kind for f in faults}
        self._failing_saves = failing_saves
        self._resume = resume
        self._bounds = np.linspace(0, len(weights), partitions + 1).astype(int).tolist()
        self._observe = observe
        self.coordinator = Coordinator(
            spec,
            grid,
            validates=evaluate is not None,
            checkpoint=resume.number + 1 if resume else 0,
            saved_updates=resume.updates if resume else None,
            requeued=resume.requeued if resume else 0,
            partitions=partitions,
        )
        self.servers: dict[int, ParameterServer] = {}
        self.now = 0.0
        self.applied: list[Applied] = []
        self.computing: dict[str, Version] = {}
        self.checkpoints: list[Checkpoint] = []
        self.actions: list[tuple[float, Action]] = []
        self._workers: dict[str, _Worker] = {}
        self._reads: dict[tuple[str, BatchId], Version] = {}
        self._told_epochs: dict[int, int] = {}
        self._polls: dict[int, AskReport] = {}
        self._saving: int | None = None
        self._states: dict[int, ServerState] = {}
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self.finish: Finish | None = None
        for at, event in events:
            self._after(at, partial(self._tell, event))

    @property
    def weights(self) -> FloatArray:
        """All partitions' weights, `[num_parameters]`."""
        return np.concatenate([self.servers[partition].published for partition in sorted(self.servers)])

    def run(self) -> Self:
        """Run to the end."""
        self._tell(Started())
        for _ in range(MAX_EVENTS):
            if self.finish:
                return self
            self._advance()
            self._observe(self)
        raise AssertionError(f"no end in {MAX_EVENTS} events, at {self.now:.3f} s in phase {self.coordinator.phase}")

    def _advance(self) -> None:
        deadline = self.coordinator.next_deadline()
        soonest = self._heap[0][0] if self._heap else float("inf")
        if deadline is not None and deadline < soonest:
            self.now = max(self.now, deadline)
            self._tell(Tick())
            return
        assert self._heap, "nothing will ever happen again"
        self.now, _, happen = heappop(self._heap)
        happen()

    def _after(self, delay_s: float, happen: Callable[[], None]) -> None:
        heappush(self._heap, (self.now + delay_s, next(self._numbers), happen))

    def _tell(self, event: Event) -> None:
        for action in self.coordinator.handle(event, self.now):
            self.actions.append((self.now, action))
            self._act(action)

    def _tell_soon(self, event: Event, delay_s: float = CALL_S) -> None:
        self._after(delay_s, partial(self._tell, event))

    def did(self, kind: type[Kind]) -> list[tuple[float, Kind]]:
        """When the coordinator wanted which actions of one kind."""
        return [(at, action) for at, action in self.actions if isinstance(action, kind)]

    # Actions

    @singledispatchmethod
    def _act(self, action: Action) -> None:
        raise AssertionError(f"an unknown action: {action}")

    @_act.register
    def _on_finish(self, action: Finish) -> None:
        self.finish = action

    @_act.register
    def _on_start_server(self, action: StartServer) -> None:
        number = action.partition
        if self._resume:
            state = self._resume.states[number]
            incarnation = state.facts["version"][0] + 1
            self.servers[number] = ParameterServer.restore(self._spec, self._grid, state, incarnation, self.now)
        else:
            start, stop = self._bounds[number : number + 2]
            partition = Partition(number, start, stop, stop - start)
            part = self._initial[start:stop]
            self.servers[number] = ParameterServer(self._spec, partition, part, self._grid, Version(1, 0))
        self._told_epochs[number] = self.servers[number].epochs

    @_act.register
    def _on_start_worker(self, action: StartWorker) -> None:
        self._workers[action.worker] = _Worker(action.worker)
        if self._start_s(action.worker) < float("inf"):
            self._after(self._start_s(action.worker), partial(self._up, action.worker))

    def _up(self, name: str) -> None:
        if name in self._workers:
            self._tell(WorkerUp(name))

    @_act.register
    def _on_stop_worker(self, action: StopWorker) -> None:
        self._workers.pop(action.worker).alive = False
        self.computing.pop(action.worker, None)

    @_act.register
    def _on_join(self, action: Join) -> None:
        for partition, server in self.servers.items():
            self._deliver(partition, server.join(action.worker, self.now))

    @_act.register
    def _on_leave(self, action: Leave) -> None:
        for partition, server in self.servers.items():
            self._deliver(partition, server.leave(action.worker, self.now))
            self._notice(partition)

    @_act.register
    def _on_grant(self, action: Grant) -> None:
        self._after(CALL_S, partial(self._queue, self._workers[action.worker], action.lease))

    @_act.register
    def _on_evaluate(self, action: Evaluate) -> None:
        parts = [self.servers[partition].epoch_weights(action.epochs) for partition in sorted(self.servers)]
        task = _Validation(action.epochs, np.concatenate(parts))
        self._after(CALL_S, partial(self._queue, self._workers[action.worker], task))

    @_act.register
    def _on_cancel(self, action: Cancel) -> None:
        self._workers[action.worker].cancelled = True

    @_act.register
    def _on_ask(self, action: AskReport) -> None:
        if action.wait:
            self._polls[action.partition] = action
            self._after(POLL_S, partial(self._answer_poll, action))
            self._notice(action.partition)
        else:
            self._after(CALL_S, partial(self._answer, action))

    @_act.register
    def _on_save(self, action: Save) -> None:
        if action.checkpoint in self._failing_saves:
            self._tell_soon(SaveFailed(action.checkpoint, "the disk is full"))
            return
        self._saving, self._states = action.checkpoint, {}
        for partition in self.servers:
            self._notice(partition)

    @_act.register
    def _on_commit(self, action: Commit) -> None:
        states = tuple(self._states[partition] for partition in sorted(self._states))
        requeued = self.coordinator.ledger.requeued
        self.checkpoints.append(Checkpoint(states, action.checkpoint, action.updates, requeued))
        self._tell_soon(Committed(action.checkpoint))

    # Servers

    def _answer_poll(self, ask: AskReport) -> None:
        if self._polls.get(ask.partition) == ask:
            del self._polls[ask.partition]
            self._answer(ask)

    def _answer(self, ask: AskReport) -> None:
        report = self.servers[ask.partition].report()
        self._told_epochs[ask.partition] = report.epochs
        self._tell_soon(Reported(report, ask.asked))

    def _notice(self, partition: int) -> None:
        """Serve who waits for an epoch's end, or for a moment between rounds."""
        server = self.servers[partition]
        if partition in self._polls and server.epochs != self._told_epochs[partition]:
            self._answer_poll(self._polls[partition])
        if self._saving is not None and partition not in self._states and server.can_save:
            self._states[partition] = server.state()
            self._tell_soon(Saved(partition, self._saving, server.version.updates, server.epochs))

    def _arrive(self, gradients: Sequence[Gradient]) -> None:
        """A push reaches the servers: the i-th part the i-th server."""
        self._reads[gradients[0].worker, gradients[0].batch] = gradients[0].read
        for partition, gradient in enumerate(gradients):
            self._deliver(partition, self.servers[partition].push(gradient, self.now))
            self._notice(partition)

    def _deliver(self, partition: int, receipts: tuple[Receipt, ...]) -> None:
        for receipt in receipts:
            if partition == 0 and receipt.outcome is Outcome.APPLIED:
                read = self._reads[receipt.worker, receipt.batch]
                self.applied.append(Applied(receipt.worker, receipt.batch, read, receipt.version))
            worker = self._workers.get(receipt.worker)
            if worker and worker.alive and (partition, receipt.batch) in worker.awaited:
                worker.awaited.remove((partition, receipt.batch))
                if not worker.awaited:
                    self._next_batch(worker)

    # Workers

    def _queue(self, worker: _Worker, task: Lease | _Validation) -> None:
        worker.tasks.append(task)
        if not worker.busy:
            self._next_task(worker)

    def _next_task(self, worker: _Worker) -> None:
        worker.busy = worker.alive and bool(worker.tasks)
        if not worker.busy:
            return
        task = worker.tasks.popleft()
        if isinstance(task, Lease):
            worker.lease = task.id
            worker.batches = deque(self._grid.batch(epoch, position) for epoch, position in task.positions())
            self._next_batch(worker)
        else:
            self._after(EVALUATE_S, partial(self._validate, worker, task))

    def _validate(self, worker: _Worker, task: _Validation) -> None:
        assert self._evaluate
        if worker.alive:
            self._tell_soon(Evaluated(worker.name, task.epochs, self._evaluate(task.weights)))
            self._next_task(worker)

    def _next_batch(self, worker: _Worker) -> None:
        if worker.cancelled or not worker.batches:
            self._tell_soon(LeaseClosed(worker.name, worker.lease))
            self._next_task(worker)
            return
        batch = worker.batches.popleft()
        versions = [self.servers[partition].version for partition in sorted(self.servers)]
        values = np.empty_like(self._initial)
        try:
            loss = self._gradient(batch, self.weights, values)
        except WorkerError as error:
            self._tell_soon(WorkerFailed(worker.name, str(error)))
            return
        self.computing[worker.name] = versions[0]
        seconds = self._compute_s(worker.name, batch)
        norm = float(np.linalg.norm(values))
        gradients = [
            Gradient(worker.name, batch, self._examples(batch), read, values[start:stop], loss, norm, seconds)
            for read, start, stop in zip(versions, self._bounds, self._bounds[1:], strict=False)
        ]
        self._after(seconds, partial(self._push, worker, gradients))

    def _push(self, worker: _Worker, gradients: Sequence[Gradient]) -> None:
        if not worker.alive:
            return
        fault = self._faults.get((worker.name, worker.pushes))
        worker.pushes += 1
        self.computing.pop(worker.name)
        if fault is None:
            worker.awaited = {(partition, gradient.batch) for partition, gradient in enumerate(gradients)}
            self._arrive(gradients)
        else:
            self._fail(worker, fault, gradients)

    def _fail(self, worker: _Worker, fault: FaultKind, gradients: Sequence[Gradient]) -> None:
        if fault == "silent":
            return
        if fault == "lane":
            self._tell_soon(LaneFailed(worker.name, worker.lease, "no receipt came"))
            self._next_task(worker)
        else:
            worker.alive = False
            self._tell_soon(WorkerLost(worker.name, fault), DEATH_S)
        if fault == "late":
            self._after(LATE_S, partial(self._arrive, gradients))
        elif fault != "before":
            self._arrive(gradients[:1] if fault == "torn" else gradients)
