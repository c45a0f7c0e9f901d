"""A cluster on a virtual clock: the production coordinator, servers and ledger, and workers that take their time.

Does for the core what `psgd.cluster` does on Ray, in one thread. A gradient is computed when its worker begins, and
arrives when the worker's compute time has passed, so no version of the weights has to be kept but what workers hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    Event,
    Finish,
    Grant,
    Join,
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
    WorkerLost,
    WorkerUp,
)
from psgd.core.partitions import split
from psgd.core.server import ParameterServer, ServerState
from psgd.errors import RunError
from psgd.simulation.clock import VirtualClock, without_collector
from psgd.simulation.problem import Problem, Timing
from psgd.simulation.worker import Readers, Slot, Validation, VirtualWorker
from psgd.spec import JobSpec
from psgd_workers.messages import BatchId, FloatArray, Gradient, Receipt, Version

__all__ = ["Checkpoint", "VirtualCluster"]

MAX_EVENTS = 1 << 40
USUAL = Timing()


class Checkpoint(NamedTuple):
    """A committed checkpoint."""

    states: tuple[ServerState, ...]  # by partition
    number: int
    updates: int
    requeued: int


class VirtualCluster(VirtualClock):
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
        lease_s: virtual seconds of work in a lease.
        observe: called after each step of the first partition.

    Attributes:
        now: virtual seconds.
        parts: of the weights, by partition.
        servers: by partition, once they are started.
        workers: those that live, by name.
        checkpoint: the newest committed one.
        finish: how it ended.
    """

    def __init__(
        self,
        spec: JobSpec,
        problem: Problem,
        compute_s: Callable[[str, BatchId], float],
        *,
        timing: Timing = USUAL,
        crashes: Callable[[], float] | None = None,
        seed: int = 0,
        events: Sequence[tuple[float, Event]] = (),
        resume: Checkpoint | None = None,
        lease_s: float = 2.0,
        observe: Callable[[VirtualCluster], None] | None = None,
    ) -> None:
        super().__init__()
        self._spec = spec
        self.problem = problem
        self.timing = timing
        self.compute_s = compute_s
        self._crashes = crashes
        self._random = np.random.default_rng(seed)
        self._resume = resume
        self._observe = observe
        self._partitions = split(len(problem.weights), problem.trainable, spec.scaling.servers)
        self.parts: Sequence[slice] = [slice(part.start, part.stop) for part in self._partitions]
        assert resume is None or len(resume.states) == len(self.parts), "a checkpoint of another number of servers"
        self.coordinator = Coordinator(
            spec,
            problem.grid,
            validates=problem.evaluate is not None,
            checkpoint=resume.number + 1 if resume else 0,
            saved_updates=resume.updates if resume else None,
            saved_epochs=min(state.facts["epochs"] for state in resume.states) if resume else 0,
            requeued=resume.requeued if resume else 0,
            lease_s=lease_s,
        )
        self.servers: dict[int, ParameterServer] = {}
        self.workers: dict[str, VirtualWorker] = {}
        self.checkpoint: Checkpoint | None = None
        self.finish: Finish | None = None
        self._deadline = float("inf")
        self._told_epochs: dict[int, int] = {}
        self._polls: dict[int, AskReport] = {}
        self._saving: int | None = None
        self._states: dict[int, ServerState] = {}
        self.readers = None if spec.rules.stop_at is None else Readers(spec.rules.stop_at)
        for at, event in events:
            self.after(at, self._tell, event)
        if crashes:
            self.after(crashes(), self._crash)

    @property
    def weights(self) -> FloatArray:
        """All partitions' weights, `[num_parameters]`."""
        return np.concatenate([self.servers[partition].weights for partition in range(len(self.parts))])

    @property
    def in_flight(self) -> list[tuple[Version, ...]]:
        """By partition, the versions that each gradient to come is made of: computed, begun, or whose weights wait."""
        return [tuple(slot.reads) for worker in self.workers.values() for slot in worker.slots if slot.reads]

    def run(self, max_events: int = MAX_EVENTS) -> Self:
        """Run to the end.

        Raises:
            RunError: there was none in so many events.
        """
        self._tell(Started())
        with np.errstate(over="ignore", invalid="ignore"), without_collector():
            return self._run(max_events)

    def _run(self, max_events: int) -> Self:
        for _ in range(max_events):
            if self.finish:
                return self
            if not self.advance(self._deadline):
                self._tell(Tick())
        raise RunError(f"no end in {max_events} events, at {self.now:.3f} s in phase {self.coordinator.phase}")

    def stop(self) -> None:
        """End the run in good order."""
        self.after(0.0, self._tell, Stop("stopped"))

    def _tell(self, event: Event) -> None:
        for action in self.coordinator.handle(event, self.now):
            self.act(action)
        deadline = self.coordinator.next_deadline()
        self._deadline = float("inf") if deadline is None else deadline

    def tell_soon(self, event: Event, delay_s: float | None = None) -> None:
        """Let the coordinator hear of something after a call's time, or after `delay_s`."""
        self.after(self.timing.call_s if delay_s is None else delay_s, self._tell, event)

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
            server = ParameterServer.restore(self._spec, self.problem.grid, state, incarnation, self.now)
        else:
            weights = self.problem.weights[self.parts[number]]
            server = ParameterServer(self._spec, self._partitions[number], weights, self.problem.grid, Version(1, 0))
        self.servers[number] = server
        self._told_epochs[number] = server.epochs

    def _on_start_worker(self, action: StartWorker) -> None:
        spec, name = self._spec, action.worker
        self.workers[name] = VirtualWorker(name, self, spec.rules, spec.scaling.pipeline)
        self.after(self.start_s(name), self._up, name)

    def start_s(self, worker: str) -> float:
        """How long a worker takes to start."""
        del worker
        return self.timing.start_s

    def _up(self, name: str) -> None:
        if name in self.workers:
            self._tell(WorkerUp(name))

    def _on_stop_worker(self, action: StopWorker) -> None:
        self.kill(action.worker)

    def kill(self, name: str) -> None:
        """A worker is no more; its push under way is lost."""
        self.workers.pop(name).alive = False

    def _crash(self) -> None:
        assert self._crashes
        if self.workers and self.coordinator.phase == "training":
            name = sorted(self.workers)[int(self._random.integers(len(self.workers)))]
            self.kill(name)
            self.tell_soon(WorkerLost(name, "scripted"), self.timing.death_s)
        self.after(self._crashes(), self._crash)

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
            self.after(self.timing.call_s, worker.queue, action.lease)

    def _on_evaluate(self, action: Evaluate) -> None:
        parts = [self.servers[partition].epoch_weights(action.epochs) for partition in range(len(self.parts))]
        if worker := self.workers.get(action.worker):
            self.after(self.timing.call_s, worker.queue, Validation(action.epochs, np.concatenate(parts)))

    def _on_cancel(self, action: Cancel) -> None:
        if worker := self.workers.get(action.worker):
            worker.cancelled = True

    def _on_ask(self, action: AskReport) -> None:
        if action.wait:
            self._polls[action.partition] = action
            self.after(self.timing.poll_s, self._answer_poll, action)
            self._notice(action.partition)
        else:
            self.after(self.timing.call_s, self._answer, action)

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

    def arrive(self, gradients: Sequence[Gradient], first: int = 0) -> None:
        """A push reaches the servers, its i-th part the i-th from the `first` on."""
        updates = self.servers[0].version.updates
        for partition, gradient in enumerate(gradients, first):
            server = self.servers[partition]
            self._deliver(partition, server.push(gradient, self.now))
            if self._saving is not None or server.epochs != self._told_epochs[partition]:
                self._notice(partition)
        if self.servers[0].version.updates != updates:
            if self.readers:
                self.readers.call_off(self.servers[0].version.updates)
            if self._observe:
                self._observe(self)

    def _deliver(self, partition: int, receipts: tuple[Receipt, ...]) -> None:
        for receipt in receipts:
            worker = self.workers.get(receipt.worker)
            if worker is not None:
                worker.receive(partition, receipt, self.servers[partition].published)

    # What surrounds workers

    def pull(self) -> tuple[list[Version], FloatArray]:
        """Versions, by partition, and the weights shown now; of a single server its own memory."""
        if len(self.servers) == 1:
            return [self.servers[0].version], self.servers[0].published
        servers = [self.servers[partition] for partition in range(len(self.parts))]
        return [server.version for server in servers], np.concatenate([server.published for server in servers])

    def push(self, worker: VirtualWorker, slot: Slot, gradients: Sequence[Gradient]) -> None:
        """A worker's gradient reaches the servers."""
        del worker, slot
        self.arrive(gradients)


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
