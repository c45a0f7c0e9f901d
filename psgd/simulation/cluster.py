"""A cluster on a virtual clock: the production coordinator, servers and ledger, and workers that take their time.

Does for the core what `psgd.cluster` does on Ray, in one thread: everything happens on a heap of (time, number, what),
so a run is a function of its arguments. A gradient is computed when its worker reads the weights, and arrives when the
worker's compute time has passed, so no version of the weights has to be kept but those still out.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count, pairwise
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from psgd.core.coordinator import Coordinator
from psgd.core.events import (
    Action,
    AskReport,
    Cancel,
    ChangeServer,
    Commit,
    Committed,
    Evaluate,
    Evaluated,
    Event,
    Finish,
    Grant,
    Join,
    LeaseClosed,
    Leave,
    Reported,
    Save,
    Saved,
    Started,
    StartServer,
    StartWorker,
    Stop,
    StopWorker,
    Tick,
    WorkerFailed,
    WorkerLost,
    WorkerUp,
)
from psgd.core.server import ParameterServer, Partition, ServerState
from psgd.errors import RunError, WorkerError
from psgd.spec import JobSpec
from psgd_workers.messages import BatchId, EpochGrid, Evaluation, FloatArray, Gradient, Lease, Receipt, Version
from psgd_workers.sender import Sender, gradient_norm

__all__ = ["Checkpoint", "Problem", "Timing", "VirtualCluster", "VirtualWorker"]

MAX_EVENTS = 1 << 40


def _one_example(batch: BatchId) -> int:
    del batch
    return 1


@dataclass(frozen=True, slots=True)
class Problem:
    """What is trained: everything a cluster has to know about model and data."""

    grid: EpochGrid
    weights: FloatArray  # [num_parameters], initial
    gradient: Callable[[BatchId, FloatArray, FloatArray], float]  # (batch, weights, out) -> loss
    num_trainable: int | None = None  # values before the first buffer; None: all
    examples: Callable[[BatchId], int] = _one_example
    evaluate: Callable[[FloatArray], Evaluation] | None = None  # None: there is nothing to validate on


@dataclass(frozen=True, slots=True)
class Timing:
    """How long things take, in virtual seconds."""

    call_s: float = 0.001  # every message between the driver and an actor
    link_s: float = 0.0  # a gradient to its server, and the weights back
    start_s: float = 1.0  # a process
    poll_s: float = 0.2  # until a waiting report is given at the latest
    death_s: float = 0.05  # until the driver hears of a death
    evaluate_s: float = 0.1


@contextmanager
def _without_collector() -> Iterator[None]:
    """No cyclic garbage is made here, and looking for it among a thousand workers costs an eighth of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class Checkpoint(NamedTuple):
    """A committed checkpoint."""

    states: tuple[ServerState, ...]  # by partition
    number: int
    updates: int
    requeued: int


class _Validation(NamedTuple):
    epochs: int | None
    weights: FloatArray


@dataclass(slots=True, eq=False)
class VirtualWorker:
    """A worker process."""

    name: str
    sender: Sender
    alive: bool = True
    cancelled: bool = False
    tasks: deque[Lease | _Validation] = field(default_factory=deque)
    busy: bool = False
    lease: int = -1
    batches: deque[BatchId] = field(default_factory=deque)
    pushes: int = 0
    awaited: BatchId | None = None  # the push whose receipts have not all come
    outcomes: list[Any] = field(default_factory=list)  # of that push, by partition; None: not yet known
    computing: Version | None = None  # what the gradient in its hands was read from, of the first partition
    turn: int = 0  # counts computations, so that one that was called off is told from the next


class VirtualCluster:
    """One run.

    Args:
        spec: the job; its model and data are not looked at.
        problem: what is trained.
        compute_s: (worker, batch) -> virtual seconds of one gradient.
        timing: how long everything else takes.
        crashes: seconds until the next worker is killed; asked again after each. None: none is.
        seed: decides whom crashes hit.
        events: (virtual time, event) each, told to the coordinator besides what happens by itself.
        resume: the checkpoint to continue from.
        partitions: servers.
        lease_s: virtual seconds of work in a lease.
        observe: called after each step of the first partition.

    Attributes:
        now: virtual seconds.
        checkpoint: the newest committed one.
        finish: how it ended.
    """

    def __init__(
        self,
        spec: JobSpec,
        problem: Problem,
        compute_s: Callable[[str, BatchId], float],
        *,
        timing: Timing = Timing(),
        crashes: Callable[[], float] | None = None,
        seed: int = 0,
        events: Sequence[tuple[float, Event]] = (),
        resume: Checkpoint | None = None,
        partitions: int = 1,
        lease_s: float = 2.0,
        observe: Callable[[VirtualCluster], None] | None = None,
    ) -> None:
        self._spec = spec
        self._problem = problem
        self._compute_s = compute_s
        self._timing = timing
        self._crashes = crashes
        self._random = np.random.default_rng(seed)
        self._resume = resume
        self._observe = observe
        bounds = np.linspace(0, len(problem.weights), partitions + 1).astype(int).tolist()
        self._parts = [slice(start, stop) for start, stop in pairwise(bounds)]
        size = len(problem.weights)
        self._num_trainable = size if problem.num_trainable is None else problem.num_trainable
        self.coordinator = Coordinator(
            spec,
            problem.grid,
            validates=problem.evaluate is not None,
            checkpoint=resume.number + 1 if resume else 0,
            saved_updates=resume.updates if resume else None,
            saved_epochs=min(state.facts["epochs"] for state in resume.states) if resume else 0,
            requeued=resume.requeued if resume else 0,
            partitions=partitions,
            lease_s=lease_s,
        )
        self.servers: dict[int, ParameterServer] = {}
        self.workers: dict[str, VirtualWorker] = {}
        self.now = 0.0
        self.checkpoint: Checkpoint | None = None
        self.finish: Finish | None = None
        self._deadline = float("inf")
        self._told_epochs: dict[int, int] = {}
        self._polls: dict[int, AskReport] = {}
        self._saving: int | None = None
        self._states: dict[int, ServerState] = {}
        self._stop_at, self._sends_weights = spec.rules.stop_at, spec.rules.sends_weights
        self._links_s = 2 * timing.link_s  # to a worker and back
        self._readers: dict[int, list[tuple[VirtualWorker, int]]] = {}  # version -> who computes from it, at which turn
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = count()
        for at, event in events:
            self._after(at, self._tell, event)
        if crashes:
            self._after(crashes(), self._crash)

    @property
    def weights(self) -> FloatArray:
        """All partitions' weights, `[num_parameters]`."""
        return np.concatenate([self.servers[partition].weights for partition in sorted(self.servers)])

    @property
    def computing(self) -> dict[str, Version]:
        """Worker -> version that the gradient in its hands was read from."""
        return {name: worker.computing for name, worker in self.workers.items() if worker.computing is not None}

    def run(self, max_events: int = MAX_EVENTS) -> Self:
        """Run to the end.

        Raises:
            RunError: there was none in so many events.
        """
        self._tell(Started())
        with np.errstate(over="ignore", invalid="ignore"), _without_collector():
            return self._run(max_events)

    def _run(self, max_events: int) -> Self:
        heap = self._heap
        for _ in range(max_events):
            if self.finish:
                return self
            if not heap or self._deadline < heap[0][0]:
                assert self._deadline < float("inf"), "nothing will ever happen again"
                self.now = max(self.now, self._deadline)
                self._tell(Tick())
                continue
            self.now, _, happen, arguments = heappop(heap)
            happen(*arguments)
        raise RunError(f"no end in {max_events} events, at {self.now:.3f} s in phase {self.coordinator.phase}")

    def stop(self) -> None:
        """End the run in good order."""
        self._after(0.0, self._tell, Stop("stopped"))

    def _after(self, delay_s: float, happen: Callable[..., None], *arguments: Any) -> None:
        heappush(self._heap, (self.now + delay_s, next(self._numbers), happen, arguments))

    def _tell(self, event: Event) -> None:
        for action in self.coordinator.handle(event, self.now):
            self.act(action)
        deadline = self.coordinator.next_deadline()
        self._deadline = float("inf") if deadline is None else deadline

    def tell_soon(self, event: Event, delay_s: float | None = None) -> None:
        """Let the coordinator hear of something after a call's time, or after `delay_s`."""
        self._after(self._timing.call_s if delay_s is None else delay_s, self._tell, event)

    # Actions

    def act(self, action: Action) -> None:
        """Do what the coordinator wants."""
        _ACTIONS[type(action)](self, action)

    def _on_finish(self, action: Finish) -> None:
        self.finish = action

    def _on_start_server(self, action: StartServer) -> None:
        number = action.partition
        if self._resume:
            state = self._resume.states[number]
            incarnation = state.facts["version"][0] + 1
            server = ParameterServer.restore(self._spec, self._problem.grid, state, incarnation, self.now)
        else:
            part = self._parts[number]
            trained = max(0, min(part.stop, self._num_trainable) - part.start)
            partition = Partition(number, part.start, part.stop, trained)
            weights = self._problem.weights[part]
            server = ParameterServer(self._spec, partition, weights, self._problem.grid, Version(1, 0))
        self.servers[number] = server
        self._told_epochs[number] = server.epochs

    def _on_start_worker(self, action: StartWorker) -> None:
        sender = Sender(action.worker, self._parts, self._num_trainable, self._spec.rules)
        self.workers[action.worker] = VirtualWorker(action.worker, sender)
        self._after(self.start_s(action.worker), self._up, action.worker)

    def start_s(self, worker: str) -> float:
        """How long a worker takes to start."""
        del worker
        return self._timing.start_s

    def _up(self, name: str) -> None:
        if name in self.workers:
            self._tell(WorkerUp(name))

    def _on_stop_worker(self, action: StopWorker) -> None:
        self.kill(action.worker)

    def kill(self, name: str) -> None:
        """A worker is no more; its push under way is lost."""
        worker = self.workers.pop(name)
        worker.alive, worker.computing = False, None

    def _crash(self) -> None:
        assert self._crashes
        if self.workers and self.coordinator.phase == "training":
            name = sorted(self.workers)[int(self._random.integers(len(self.workers)))]
            self.kill(name)
            self.tell_soon(WorkerLost(name, "scripted"), self._timing.death_s)
        self._after(self._crashes(), self._crash)

    def _on_join(self, action: Join) -> None:
        for partition, server in self.servers.items():
            self._deliver(partition, server.join(action.worker, self.now))

    def _on_leave(self, action: Leave) -> None:
        for partition, server in self.servers.items():
            self._deliver(partition, server.leave(action.worker, self.now))
            self._notice(partition)

    def _on_change(self, action: ChangeServer) -> None:
        self._deliver(action.partition, self.servers[action.partition].change(action.settings, self.now))
        self._notice(action.partition)

    def _on_grant(self, action: Grant) -> None:
        if worker := self.workers.get(action.worker):  # else it died, and the driver is about to hear of it
            self._after(self._timing.call_s, self._queue, worker, action.lease)

    def _on_evaluate(self, action: Evaluate) -> None:
        parts = [self.servers[partition].epoch_weights(action.epochs) for partition in sorted(self.servers)]
        if worker := self.workers.get(action.worker):
            self._after(self._timing.call_s, self._queue, worker, _Validation(action.epochs, np.concatenate(parts)))

    def _on_cancel(self, action: Cancel) -> None:
        if worker := self.workers.get(action.worker):
            worker.cancelled = True

    def _on_ask(self, action: AskReport) -> None:
        if action.wait:
            self._polls[action.partition] = action
            self._after(self._timing.poll_s, self._answer_poll, action)
            self._notice(action.partition)
        else:
            self._after(self._timing.call_s, self._answer, action)

    def _on_save(self, action: Save) -> None:
        self._saving, self._states = action.checkpoint, {}
        for partition in self.servers:
            self._notice(partition)

    def _on_commit(self, action: Commit) -> None:
        states = tuple(self._states[partition] for partition in sorted(self._states))
        requeued = self.coordinator.ledger.requeued
        self.checkpoint = Checkpoint(states, action.checkpoint, action.updates, requeued)
        self.tell_soon(Committed(action.checkpoint))

    # Servers

    def _answer_poll(self, ask: AskReport) -> None:
        if self._polls.get(ask.partition) == ask:
            del self._polls[ask.partition]
            self._answer(ask)

    def _answer(self, ask: AskReport) -> None:
        server = self.servers[ask.partition]
        self._told_epochs[ask.partition] = server.epochs
        self.journal(ask.partition, server.journal.take())
        self.tell_soon(Reported(server.report(), ask.asked))

    def journal(self, partition: int, records: NDArray[np.void]) -> None:
        """Records of a partition's journal, in its order; here nobody keeps them."""

    def _notice(self, partition: int) -> None:
        """Serve who waits for an epoch's end, or for a moment at which the state can be saved."""
        server = self.servers[partition]
        if server.epochs != self._told_epochs[partition] and partition in self._polls:
            self._answer_poll(self._polls[partition])
        if self._saving is not None and partition not in self._states and server.can_save:
            self._states[partition] = server.state()
            self.tell_soon(Saved(partition, self._saving, server.version.updates, server.epochs))

    def arrive(self, gradients: Sequence[Gradient]) -> None:
        """A push reaches the servers: the i-th part the i-th server."""
        first = self.servers[0].version.updates
        for partition, gradient in enumerate(gradients):
            server = self.servers[partition]
            self._deliver(partition, server.push(gradient, self.now))
            if self._saving is not None or server.epochs != self._told_epochs[partition]:
                self._notice(partition)
        if self.servers[0].version.updates != first:
            if self._stop_at is not None:
                self._call_off()
            if self._observe:
                self._observe(self)

    def _deliver(self, partition: int, receipts: tuple[Receipt, ...]) -> None:
        for receipt in receipts:
            worker = self.workers.get(receipt.worker)
            if worker is None or not worker.alive or worker.awaited != receipt.batch:
                continue
            worker.outcomes[partition] = receipt.outcome
            if len(worker.outcomes) == 1 or None not in worker.outcomes:
                worker.awaited = None
                worker.sender.settle(worker.outcomes)
                self._next_batch(worker)

    # Workers

    def _queue(self, worker: VirtualWorker, task: Lease | _Validation) -> None:
        worker.tasks.append(task)
        if not worker.busy:
            self.next_task(worker)

    def next_task(self, worker: VirtualWorker) -> None:
        """Go on with the next lease or evaluation, if there is one."""
        worker.busy = worker.alive and bool(worker.tasks)
        if not worker.busy:
            return
        task = worker.tasks.popleft()
        if isinstance(task, Lease):
            grid = self._problem.grid
            worker.lease = task.id
            worker.batches = deque(grid.batch(epoch, position) for epoch, position in task.positions())
            self._next_batch(worker)
        else:
            self._after(self._timing.evaluate_s, self._validate, worker, task)

    def _validate(self, worker: VirtualWorker, task: _Validation) -> None:
        assert self._problem.evaluate
        if worker.alive:
            self.tell_soon(Evaluated(worker.name, task.epochs, self._problem.evaluate(task.weights)))
            self.next_task(worker)

    def _next_batch(self, worker: VirtualWorker) -> None:
        """Read the weights, and compute; the result is pushed when its time has passed."""
        if worker.cancelled or not worker.batches:
            self.tell_soon(LeaseClosed(worker.name, worker.lease, worker.sender.residual_norm))
            self.next_task(worker)
            return
        batch, problem, servers = worker.batches.popleft(), self._problem, self.servers
        if len(servers) == 1:
            reads, weights = [servers[0].version], servers[0].published
        else:
            reads = [servers[partition].version for partition in sorted(servers)]
            weights = np.concatenate([servers[partition].published for partition in sorted(servers)])
        values = np.empty_like(problem.weights)
        try:
            loss = problem.gradient(batch, weights, values)
        except WorkerError as error:
            self.tell_soon(WorkerFailed(worker.name, str(error)))
            return
        seconds = self._compute_s(worker.name, batch)
        if self._sends_weights:
            weights = weights.copy()  # the server goes on to step in place
        worker.turn += 1
        worker.computing = reads[0]
        if self._stop_at is not None:
            self._readers.setdefault(reads[0].updates, []).append((worker, worker.turn))
        computed = (worker, worker.turn, batch, reads, values, weights, loss, seconds)
        at = self.now + seconds + self._links_s
        heappush(self._heap, (at, next(self._numbers), self._computed, computed))

    def _computed(
        self,
        worker: VirtualWorker,
        turn: int,
        batch: BatchId,
        reads: list[Version],
        values: FloatArray,
        weights: FloatArray,
        loss: float,
        seconds: float,
    ) -> None:
        """`weights` is the server's own memory, unless the job sends what was read."""
        if not worker.alive or worker.turn != turn:
            return
        worker.computing = None
        examples, norm = self._problem.examples(batch), gradient_norm(values, self._num_trainable)
        gradients = worker.sender.gradients(batch, examples, reads, values, weights, loss, norm, seconds)
        worker.pushes += 1
        worker.awaited, worker.outcomes = batch, [None] * len(gradients)
        self.push(worker, gradients)

    def push(self, worker: VirtualWorker, gradients: Sequence[Gradient]) -> None:
        """A worker's gradient is ready."""
        del worker
        self.arrive(gradients)

    def _call_off(self) -> None:
        """Whoever computes from weights that are too old by now starts over with the next batch."""
        assert self._stop_at is not None
        oldest = self.servers[0].version.updates - self._stop_at
        for version in [version for version in self._readers if version <= oldest]:
            for worker, turn in self._readers.pop(version):
                if worker.alive and worker.turn == turn and worker.computing is not None:
                    worker.turn += 1
                    worker.computing = None
                    self._next_batch(worker)


_ACTIONS: dict[type[Any], Callable[[VirtualCluster, Any], None]] = {
    AskReport: VirtualCluster._on_ask,
    Cancel: VirtualCluster._on_cancel,
    ChangeServer: VirtualCluster._on_change,
    Commit: VirtualCluster._on_commit,
    Evaluate: VirtualCluster._on_evaluate,
    Finish: VirtualCluster._on_finish,
    Grant: VirtualCluster._on_grant,
    Join: VirtualCluster._on_join,
    Leave: VirtualCluster._on_leave,
    Save: VirtualCluster._on_save,
    StartServer: VirtualCluster._on_start_server,
    StartWorker: VirtualCluster._on_start_worker,
    StopWorker: VirtualCluster._on_stop_worker,
}
