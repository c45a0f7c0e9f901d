"""A cluster on a virtual clock: the production coordinator, servers and ledger, and workers that take their time.

Does for the core what `psgd.cluster` does on Ray, in one thread. A gradient is computed when its worker begins, and
arrives when the worker's compute time has passed, so no version of the weights has to be kept but what workers hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from psgd.core.driver.coordinator import Coordinator
from psgd.core.driver.events import (
    Action,
    AskReport,
    Cancel,
    ChangeServer,
    Commit,
    Committed,
    Evaluate,
    EvaluationLost,
    Event,
    Finish,
    Grant,
    Join,
    Leave,
    Note,
    Reported,
    Save,
    Saved,
    ServerLost,
    Skip,
    Started,
    StartServer,
    StartWorker,
    Stop,
    StopWorker,
    Tick,
    WorkerLost,
    WorkerUp,
)
from psgd.core.driver.status import RunStatus
from psgd.core.server.observer import ServerObserver
from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.partitions import partition_weights
from psgd.core.server.repartition import disagreement, repartition
from psgd.core.server.state import ServerState
from psgd.errors import ResumeError, RunError, WeightsNotKeptError
from psgd.simulation.clock import VirtualClock, without_collector
from psgd.simulation.faults import FaultPlan
from psgd.simulation.network import Network
from psgd.simulation.observer import ClusterObserver
from psgd.simulation.problem import Problem, Timing
from psgd.simulation.worker import Readers, Validation, VirtualWorker
from psgd.spec import JobSpec
from psgd_workers.loop import PipelineSlot
from psgd_workers.messages import BatchId, FloatArray, Gradient, Version

__all__ = ["VirtualCheckpoint", "VirtualCluster"]

MAX_EVENTS = 1 << 40
USUAL = Timing()


class VirtualCheckpoint(NamedTuple):
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
        start_s: worker -> virtual seconds that its process takes to start. None: as `timing` says.
        faults: what fails. None: nothing.
        events: (virtual time, event) each, told to the coordinator besides what happens by itself.
        resume: the checkpoint to continue from.
        incarnation: the newest incarnation of a server before this run.
        lease_s: virtual seconds of work in a lease.
        observers: told what the run does.
        server: the class of the servers.
        server_observer: partition -> observer of a server that starts now. None: servers have none.

    Attributes:
        now: virtual seconds.
        parts: of the weights, by partition.
        servers: by partition, while there is one.
        workers: those that live, by name.
        checkpoint: the newest committed one.
        finish: how it ended.
        dead: true once the driver was killed.
    """

    def __init__(
        self,
        spec: JobSpec,
        problem: Problem,
        compute_s: Callable[[str, BatchId], float],
        *,
        timing: Timing = USUAL,
        start_s: Callable[[str], float] | None = None,
        faults: FaultPlan | None = None,
        events: Sequence[tuple[float, Event]] = (),
        resume: VirtualCheckpoint | None = None,
        incarnation: int = 0,
        lease_s: float = 2.0,
        observers: Sequence[ClusterObserver] = (),
        server: type[ParameterServer] = ParameterServer,
        server_observer: Callable[[int], ServerObserver | None] | None = None,
    ) -> None:
        super().__init__()
        self._spec = spec
        self.problem = problem
        self.timing = timing
        self.compute_s = compute_s
        self._start_s = start_s
        self._resume = resume
        self._server = server
        self._server_observer = server_observer
        self._faults = faults or FaultPlan()
        self._network = Network(self, self._faults)
        self.observers = observers
        self._partitions = partition_weights(len(problem.weights), problem.trainable, spec.scaling.servers)
        self.parts: Sequence[slice] = [slice(part.start, part.stop) for part in self._partitions]
        self.coordinator = Coordinator(
            spec,
            problem.grid,
            validates=problem.evaluate is not None,
            checkpoint=resume.number + 1 if resume else 0,
            saved_updates=resume.updates if resume else None,
            saved_epochs=min(state.metadata["epochs"] for state in resume.states) if resume else 0,
            requeued=resume.requeued if resume else 0,
            lease_s=lease_s,
        )
        self.servers: dict[int, ParameterServer] = {}
        self.workers: dict[str, VirtualWorker] = {}
        self.checkpoint: VirtualCheckpoint | None = None
        self.finish: Finish | None = None
        self.dead = False
        self._deadline = float("inf")
        self._incarnation = incarnation
        self._began_servers: set[int] = set()  # partitions that had a server
        self._told_epochs: dict[int, int] = {}
        self._polls: dict[int, AskReport] = {}
        self._asked: dict[int, list[AskReport]] = {}  # of servers that are not there yet
        self._saving: int | None = None
        self._states: dict[int, ServerState] = {}
        stop_at = spec.worker_options.stop_at
        self.readers = Readers(stop_at) if timing.interrupts and stop_at is not None else None
        for at, event in events:
            self.after(at, self._tell, event)
        self._faults.begin(self)

    @property
    def weights(self) -> FloatArray:
        """All partitions' weights, `[num_parameters]`."""
        return np.concatenate([self.servers[partition].weights for partition in range(len(self.parts))])

    @property
    def status(self) -> RunStatus:
        """The run now, as its coordinator describes it."""
        return self.coordinator.status(self.now)

    @property
    def newest_checkpoint(self) -> VirtualCheckpoint | None:
        """The newest committed one, of this run or the one it resumed."""
        return self.checkpoint or self._resume

    @property
    def in_flight(self) -> list[tuple[Version, ...]]:
        """By partition, the versions that each gradient to come is made of: computed, begun, or whose weights wait."""
        return [tuple(slot.reads) for worker in self.workers.values() for slot in worker.slots if slot.reads]

    def run(self, max_events: int = MAX_EVENTS, max_s: float = float("inf")) -> Self:
        """Run to the end, or to the driver's death.

        Raises:
            RunError: neither came in so many events and virtual seconds.
        """
        self._tell(Started())
        with np.errstate(over="ignore", invalid="ignore"), without_collector():
            for _ in range(max_events):
                if self.finish or self.dead:
                    return self
                if self.now > max_s:
                    break
                if not self.advance(self._deadline):
                    self._tell(Tick())
        raise RunError(
            f"no end after {max_events} events or {max_s} s, at {self.now:.3f} s in phase {self.status.phase}"
        )

    def stop(self) -> None:
        """End the run in good order."""
        self.after(0.0, self._tell, Stop("stopped"))

    def kill_driver(self) -> None:
        """The driver is no more, and everything it started ends with it."""
        self.dead = True

    def _tell(self, event: Event) -> None:
        for observer in self.observers:
            observer.told(self, event)
        for action in self.coordinator.handle(event, self.now):
            self.act(action)
        deadline = self.coordinator.next_deadline()
        self._deadline = float("inf") if deadline is None else deadline

    def tell_soon(self, event: Event, delay_s: float | None = None) -> None:
        """Let the coordinator hear of something after a call's time, or after `delay_s`."""
        self.after(self.timing.call_s if delay_s is None else delay_s, self._tell, event)

    # Actions

    def act(self, action: Action) -> None:
        """Do what the coordinator wants, if the fault plan allows it."""
        if self._faults.allows(action):
            _ACTIONS[type(action)](self, action)
        for observer in self.observers:
            observer.acted(self, action)

    def _on_finish(self, action: Finish) -> None:
        self.finish = action

    def _on_start_server(self, action: StartServer) -> None:
        partition = action.partition
        if partition in self._began_servers:
            self._end_server(partition)
            asked = self._asked[partition] = []
            self.after(self.timing.restore_s, self._restore, partition, asked)
        else:
            self.start_server(partition)

    def _restore(self, partition: int, asked: list[AskReport]) -> None:
        if self._asked.get(partition) is not asked:
            return  # it was started anew meanwhile
        del self._asked[partition]
        self.start_server(partition)
        for ask in asked:
            self.act(ask)

    def start_server(self, partition: int) -> None:
        """A server is there, of the newest checkpoint or, if there is none, of the initial weights."""
        origin = self.newest_checkpoint
        state = self._state(origin.states, partition) if origin else None
        incarnation = self._next_incarnation(partition, origin)
        spec = self._spec
        grid = self.problem.grid
        watching = self._server_observer and self._server_observer(partition)
        if state:
            server = self._server.restore(spec, grid, state, incarnation, self.now, observer=watching)
        else:
            weights = self.problem.weights[self.parts[partition]]
            version = Version(incarnation, 0)
            server = self._server(spec, self._partitions[partition], weights, grid, version, observer=watching)
        self.servers[partition] = server
        self._told_epochs[partition] = server.epochs
        for observer in self.observers:
            observer.started(self, partition)

    def _next_incarnation(self, partition: int, origin: VirtualCheckpoint | None) -> int:
        """Return the incarnation of a new server. Servers that start with the run share one."""
        if partition in self._began_servers:
            self._incarnation += 1
        elif not self._began_servers:
            saved = max(state.metadata["version"][0] for state in origin.states) if origin else 0
            self._incarnation = max(saved, self._incarnation) + 1
        self._began_servers.add(partition)
        return self._incarnation

    def _state(self, states: Sequence[ServerState], partition: int) -> ServerState:
        if len(states) == len(self.parts):
            return states[partition]
        if reason := disagreement(states):
            raise ResumeError(f"a checkpoint of {len(states)} servers cannot be cut for {len(self.parts)}: {reason}")
        return repartition(states, self._partitions[partition])

    def kill_server(self, partition: int, heard_s: float | None = None) -> None:
        """End a server's process. Workers that wait for its answer learn of that at once.

        Args:
            partition: the server's partition.
            heard_s: virtual seconds until the driver hears of it; None: `timing.death_s`.
        """
        self._end_server(partition)
        self.tell_soon(ServerLost(partition, "scripted"), self.timing.death_s if heard_s is None else heard_s)

    def _end_server(self, partition: int) -> None:
        self.servers.pop(partition, None)
        self._polls.pop(partition, None)
        self._asked.pop(partition, None)
        for worker in list(self.workers.values()):
            if any(slot.batch is not None and slot.outcomes[partition] is None for slot in worker.slots):
                worker.lose_lane("its server is gone")

    def _on_start_worker(self, action: StartWorker) -> None:
        spec = self._spec
        name = action.worker
        self.workers[name] = VirtualWorker(name, self, spec.worker_options, spec.scaling.pipeline)
        seconds = self.timing.start_s if self._start_s is None else self._start_s(name)
        self.after(seconds, self._up, name)

    def _up(self, name: str) -> None:
        if name in self.workers:
            self._tell(WorkerUp(name))

    def _on_stop_worker(self, action: StopWorker) -> None:
        self.kill(action.worker)

    def kill(self, name: str) -> None:
        """A worker is no more; its push under way is lost."""
        if worker := self.workers.pop(name, None):
            worker.alive = False

    def lose_worker(self, name: str, cause: str = "scripted", preempted: bool = False) -> None:
        """A worker dies, and the driver hears of it a little later."""
        self.kill(name)
        self.tell_soon(WorkerLost(name, cause, preempted), self.timing.death_s)

    def _on_join(self, action: Join) -> None:
        for partition, server in list(self.servers.items()):
            self._network.deliver(partition, server.join(action.worker, self.now))

    def _on_leave(self, action: Leave) -> None:
        for partition, server in list(self.servers.items()):
            self._network.deliver(partition, server.leave(action.worker, self.now))
            self.notice(partition)

    def _on_change(self, action: ChangeServer) -> None:
        if server := self.servers.get(action.partition):
            self._network.deliver(action.partition, server.change(action.settings, self.now))
            self.notice(action.partition)

    def _on_grant(self, action: Grant) -> None:
        if worker := self.workers.get(action.worker):  # else it died, and the driver is about to hear of it
            self.after(self.timing.call_s, worker.queue, action.lease)

    def _on_evaluate(self, action: Evaluate) -> None:
        try:
            parts = [self.servers[partition].epoch_weights(action.epochs) for partition in range(len(self.parts))]
        except (KeyError, WeightsNotKeptError):  # a partition has no server, or it keeps no such weights
            self.tell_soon(EvaluationLost(action.worker, action.epochs))
            return
        if worker := self.workers.get(action.worker):
            self.after(self.timing.call_s, worker.queue, Validation(action.epochs, np.concatenate(parts)))

    def _on_cancel(self, action: Cancel) -> None:
        if worker := self.workers.get(action.worker):
            worker.cancel(action.lease)

    def _on_ask(self, action: AskReport) -> None:
        if action.partition in self._asked:
            self._asked[action.partition].append(action)
        elif action.partition not in self.servers:
            pass  # it dies with the question
        elif action.wait:
            self._polls[action.partition] = action
            self.after(self.timing.poll_s, self._answer_poll, action)
            self.notice(action.partition)
        else:
            self.after(self.timing.call_s, self._answer, action)

    def _on_skip(self, action: Skip) -> None:
        for partition, server in list(self.servers.items()):
            self._network.deliver(partition, server.skip(action.batch, self.problem.examples(action.batch), self.now))
            self.notice(partition)

    def _on_note(self, action: Note) -> None:
        """Nobody writes it down here."""

    def _on_save(self, action: Save) -> None:
        self._saving = action.checkpoint
        self._states = {}
        for partition in self.servers:
            self.notice(partition)

    def _on_commit(self, action: Commit) -> None:
        states = tuple(self._states[partition] for partition in sorted(self._states))
        requeued = self.status.ledger.requeued
        self.checkpoint = VirtualCheckpoint(states, action.checkpoint, action.updates, requeued)
        self.tell_soon(Committed(action.checkpoint))

    # Servers

    def _answer_poll(self, ask: AskReport) -> None:
        if self._polls.get(ask.partition) == ask:
            del self._polls[ask.partition]
            self._answer(ask)

    def _answer(self, ask: AskReport) -> None:
        server = self.servers.get(ask.partition)
        if server is None:
            return
        self._told_epochs[ask.partition] = server.epochs
        records = server.journal.take()
        for observer in self.observers:
            observer.journalled(self, ask.partition, records)
        self.tell_soon(Reported(server.report(), ask.asked))

    def notice(self, partition: int) -> None:
        """Serve who waits for an epoch's end, or for a moment at which the state can be saved."""
        server = self.servers.get(partition)
        if server is None:
            return
        if server.epochs != self._told_epochs[partition] and partition in self._polls:
            self._answer_poll(self._polls[partition])
        if self._saving is not None and partition not in self._states and server.can_save:
            state = self._states[partition] = server.state()
            for observer in self.observers:
                observer.saved(self, partition, self._saving, state)
            self.tell_soon(Saved(partition, self._saving, server.version.updates, server.epochs))

    def stepped(self) -> None:
        """The first partition's server has made a step."""
        if self.readers:
            self.readers.call_off(self.servers[0].version.updates)
        for observer in self.observers:
            observer.stepped(self)

    # What surrounds workers

    def versions(self, worker: str) -> list[Version] | None:
        """See `Network.versions`."""
        return self._network.versions(worker)

    def pull(self, worker: str) -> tuple[list[Version], FloatArray] | None:
        """See `Network.pull`."""
        return self._network.pull(worker)

    def push(self, worker: VirtualWorker, slot: PipelineSlot, gradients: Sequence[Gradient]) -> None:
        """See `Network.push`."""
        self._network.push(worker, slot, gradients)


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
    Note: VirtualCluster._on_note,
    Save: VirtualCluster._on_save,
    Skip: VirtualCluster._on_skip,
    StartServer: VirtualCluster._on_start_server,
    StartWorker: VirtualCluster._on_start_worker,
    StopWorker: VirtualCluster._on_stop_worker,
}
