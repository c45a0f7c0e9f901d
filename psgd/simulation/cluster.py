"""A cluster on a virtual clock: the production coordinator, servers and ledger, with simulated workers.

It does for the core, in one thread, what `psgd.cluster` does on Ray. A gradient is computed when its worker begins it,
and arrives when the worker's compute time has passed, so that no old version of the weights has to be stored.
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
from psgd.simulation.observer import ClusterObserver, overridden
from psgd.simulation.problem import Problem, Timing
from psgd.simulation.push_path import PushPath
from psgd.simulation.worker import RunningComputations, Validation, VirtualWorker
from psgd.spec import JobSpec
from psgd_workers.counting import counted
from psgd_workers.messages import BatchId, FloatArray, Version

__all__ = ["VirtualCheckpoint", "VirtualCluster"]

MAX_EVENTS = 1 << 40
DEFAULT_TIMING = Timing()


class VirtualCheckpoint(NamedTuple):
    """A committed checkpoint."""

    states: tuple[ServerState, ...]  # by partition
    number: int  # number of the checkpoint
    updates: int  # number of updates in the weights
    requeued: int  # number of pushes requeued by the run so far


class VirtualCluster(VirtualClock):
    """A cluster that runs one job.

    Args:
        spec: the job. Its model and data are ignored.
        problem: training problem.
        compute_s: function (worker, batch) -> virtual seconds of one gradient.
        timing: durations of everything else.
        start_s: function worker -> virtual seconds that its process takes to start. None: `timing.start_s`.
        faults: plan of what fails. None: nothing fails.
        events: (virtual time, event) pairs that are sent to the coordinator in addition to the cluster's own events.
        resume: checkpoint to continue from. None: the initial weights.
        incarnation: newest incarnation of any server before this run.
        lease_s: virtual seconds of work in a lease.
        observers: observers of the run.
        server: class of the servers.
        server_observer: function partition -> observer of a server that starts now. None: servers have no observer.

    Attributes:
        now: current time in virtual seconds.
        parts: each partition's slice of the weights.
        network: network between the workers and the servers.
        servers: live servers by partition.
        push_paths: ways of pushes into them, by partition.
        workers: live workers by name.
        checkpoint: newest checkpoint committed by this run, or None.
        finish: the coordinator's last action, which says how the run ended. None: it has not ended.
        dead: True once the driver was killed.
    """

    def __init__(
        self,
        spec: JobSpec,
        problem: Problem,
        compute_s: Callable[[str, BatchId], float],
        *,
        timing: Timing = DEFAULT_TIMING,
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
        self.network = Network(self, self._faults)
        self.observers = observers
        self.pushed_hooks = overridden(observers, "pushed")
        self.answered_hooks = overridden(observers, "answered")
        self._stepped_hooks = overridden(observers, "stepped")
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
        self.push_paths: dict[int, PushPath] = {}
        self.workers: dict[str, VirtualWorker] = {}
        self.checkpoint: VirtualCheckpoint | None = None
        self.finish: Finish | None = None
        self.dead = False
        self._deadline = float("inf")
        self._incarnation = incarnation
        self._started_partitions: set[int] = set()  # partitions that have had a server in this run
        self._reported_epochs: dict[int, int] = {}  # complete epochs in the last report, by partition
        self._polls: dict[int, AskReport] = {}  # requests that wait for the end of an epoch, by partition
        self._unanswered: dict[int, list[AskReport]] = {}  # requests to servers that are being restored
        self._saving: int | None = None  # number of the newest checkpoint that was begun
        self._states: dict[int, ServerState] = {}  # states copied for that checkpoint
        stop_at = spec.worker_options.stop_at
        self.computations = RunningComputations(stop_at) if timing.interrupts and stop_at is not None else None
        for at, event in events:
            self.after(at, self._tell, event)
        self._faults.begin(self)

    @property
    def weights(self) -> FloatArray:
        """Copy of the weights of all partitions, `[num_parameters]`."""
        return np.concatenate([self.servers[partition].weights for partition in range(len(self.parts))])

    @property
    def status(self) -> RunStatus:
        """The coordinator's current description of the run."""
        return self.coordinator.status(self.now)

    @property
    def newest_checkpoint(self) -> VirtualCheckpoint | None:
        """Newest checkpoint that was committed by this run or by the run that it resumed."""
        return self.checkpoint or self._resume

    @property
    def in_flight(self) -> list[tuple[Version, ...]]:
        """For each gradient that is yet to arrive, the version of every partition that it is computed from.

        This includes gradients whose weights have arrived, but whose computation has not begun.
        """
        return [tuple(slot.reads) for worker in self.workers.values() for slot in worker.slots if slot.reads]

    def run(self, max_events: int = MAX_EVENTS, max_s: float = float("inf")) -> Self:
        """Run until the job ends or the driver is killed.

        Args:
            max_events: largest number of events.
            max_s: largest number of virtual seconds.

        Raises:
            RunError: the run did not end within these limits.
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
            f"the simulated run did not end within {max_events} events and {max_s} virtual seconds: at "
            f"{self.now:.3f} s it is in phase {self.status.phase}"
        )

    def stop(self) -> None:
        """Ask the coordinator to save the run and end it."""
        self.after(0.0, self._tell, Stop("stopped"))

    def kill_driver(self) -> None:
        """Kill the driver, which ends the workers and servers that it started."""
        self.dead = True

    def _tell(self, event: Event) -> None:
        """Let the coordinator handle an event now, and carry out its actions."""
        for observer in self.observers:
            observer.event_received(self, event)
        for action in self.coordinator.handle(event, self.now):
            self.act(action)
        deadline = self.coordinator.next_deadline()
        self._deadline = float("inf") if deadline is None else deadline

    def tell_soon(self, event: Event, delay_s: float | None = None) -> None:
        """Send an event to the coordinator.

        Args:
            event: the event.
            delay_s: virtual seconds until it arrives. None: `timing.call_s`.
        """
        self.after(self.timing.call_s if delay_s is None else delay_s, self._tell, event)

    # Actions

    def act(self, action: Action) -> None:
        """Carry out an action of the coordinator, if the fault plan allows it."""
        if self._faults.allows(action):
            _ACTIONS[type(action)](self, action)
        for observer in self.observers:
            observer.acted(self, action)

    def _on_finish(self, action: Finish) -> None:
        self.finish = action

    def _on_start_server(self, action: StartServer) -> None:
        partition = action.partition
        if partition in self._started_partitions:
            self._end_server(partition)
            unanswered = self._unanswered[partition] = []
            self.after(self.timing.restore_s, self._restore, partition, unanswered)
        else:
            self.start_server(partition)

    def _restore(self, partition: int, unanswered: list[AskReport]) -> None:
        if self._unanswered.get(partition) is not unanswered:
            return  # the server was killed or started again in the meantime
        del self._unanswered[partition]
        self.start_server(partition)
        for request in unanswered:
            self.act(request)

    def start_server(self, partition: int) -> None:
        """Start a server from the newest checkpoint or, if there is none, from the initial weights."""
        origin = self.newest_checkpoint
        state = self._partition_state(origin.states, partition) if origin else None
        incarnation = self._next_incarnation(partition, origin)
        spec = self._spec
        grid = self.problem.grid
        server_observer = self._server_observer and self._server_observer(partition)
        if state:
            server = self._server.restore(spec, grid, state, incarnation, self.now, observer=server_observer)
        else:
            weights = self.problem.weights[self.parts[partition]]
            version = Version(incarnation, 0)
            server = self._server(spec, self._partitions[partition], weights, grid, version, observer=server_observer)
        self.servers[partition] = server
        self.push_paths[partition] = PushPath(server)
        self._reported_epochs[partition] = server.epochs
        for observer in self.observers:
            observer.started(self, partition)

    def _next_incarnation(self, partition: int, origin: VirtualCheckpoint | None) -> int:
        """Return the incarnation of a new server. All servers that start with the run have the same one."""
        if partition in self._started_partitions:
            self._incarnation += 1
        elif not self._started_partitions:
            saved = max(state.metadata["version"][0] for state in origin.states) if origin else 0
            self._incarnation = max(saved, self._incarnation) + 1
        self._started_partitions.add(partition)
        return self._incarnation

    def _partition_state(self, states: Sequence[ServerState], partition: int) -> ServerState:
        """Return a partition's state from a checkpoint, which may be of another number of servers."""
        if len(states) == len(self.parts):
            return states[partition]
        if reason := disagreement(states):
            raise ResumeError(
                f"a checkpoint of {counted(len(states), 'server')} cannot be cut for {len(self.parts)}: {reason}. "
                f"Resume it with {counted(len(states), 'server')}"
            )
        return repartition(states, self._partitions[partition])

    def kill_server(self, partition: int, detection_s: float | None = None) -> None:
        """Kill a server. Workers that wait for its answer lose their lane immediately.

        Args:
            partition: partition of the server.
            detection_s: virtual seconds until the driver is informed. None: `timing.death_s`.
        """
        self._end_server(partition)
        self.tell_soon(ServerLost(partition, "scripted"), self.timing.death_s if detection_s is None else detection_s)

    def _end_server(self, partition: int) -> None:
        self.servers.pop(partition, None)
        self.push_paths.pop(partition, None)
        self._polls.pop(partition, None)
        self._unanswered.pop(partition, None)
        for worker in list(self.workers.values()):
            if any(slot.batch is not None and slot.outcomes[partition] is None for slot in worker.slots):
                worker.lose_lane("the server is gone")

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
        """Kill a worker without informing the driver. Its push under way is lost."""
        if worker := self.workers.pop(name, None):
            worker.alive = False

    def lose_worker(self, name: str, cause: str = "scripted", preempted: bool = False) -> None:
        """Kill a worker, and inform the driver `timing.death_s` later."""
        self.kill(name)
        self.tell_soon(WorkerLost(name, cause, preempted), self.timing.death_s)

    def _on_join(self, action: Join) -> None:
        for partition, server in list(self.servers.items()):
            self.network.deliver(partition, server.join(action.worker, self.now))

    def _on_leave(self, action: Leave) -> None:
        for partition, server in list(self.servers.items()):
            self.network.deliver(partition, server.leave(action.worker, self.now))
            self.serve_pending(partition)

    def _on_change(self, action: ChangeServer) -> None:
        if server := self.servers.get(action.partition):
            receipts = server.change(action.settings, self.now)
            self.push_paths[action.partition].refresh()
            self.network.deliver(action.partition, receipts)
            self.serve_pending(action.partition)

    def _on_grant(self, action: Grant) -> None:
        if worker := self.workers.get(action.worker):  # else it died, and the driver is about to be informed
            self.after(self.timing.call_s, worker.queue, action.lease)

    def _on_evaluate(self, action: Evaluate) -> None:
        try:
            parts = [self.servers[partition].epoch_weights(action.epochs) for partition in range(len(self.parts))]
        except (KeyError, WeightsNotKeptError):  # a partition has no server, or its server does not keep these weights
            self.tell_soon(EvaluationLost(action.worker, action.epochs))
            return
        if worker := self.workers.get(action.worker):
            self.after(self.timing.call_s, worker.queue, Validation(action.epochs, np.concatenate(parts)))

    def _on_cancel(self, action: Cancel) -> None:
        if worker := self.workers.get(action.worker):
            worker.cancel(action.lease)

    def _on_ask_report(self, action: AskReport) -> None:
        if action.partition in self._unanswered:
            self._unanswered[action.partition].append(action)
        elif action.partition not in self.servers:
            pass  # the server is dead, and so the request is lost
        elif action.wait:
            self._polls[action.partition] = action
            self.after(self.timing.poll_s, self._answer_poll, action)
            self.serve_pending(action.partition)
        else:
            self.after(self.timing.call_s, self._answer, action)

    def _on_skip(self, action: Skip) -> None:
        for partition, server in list(self.servers.items()):
            self.network.deliver(partition, server.skip(action.batch, self.now))
            self.serve_pending(partition)

    def _on_note(self, action: Note) -> None:
        """Ignore a note: the virtual cluster has no event log."""

    def _on_save(self, action: Save) -> None:
        self._saving = action.checkpoint
        self._states = {}
        for partition in self.servers:
            self.serve_pending(partition)

    def _on_commit(self, action: Commit) -> None:
        states = tuple(self._states[partition] for partition in sorted(self._states))
        requeued = self.status.ledger.requeued
        self.checkpoint = VirtualCheckpoint(states, action.checkpoint, action.updates, requeued)
        self.tell_soon(Committed(action.checkpoint))

    # Servers

    def _answer_poll(self, request: AskReport) -> None:
        if self._polls.get(request.partition) == request:
            del self._polls[request.partition]
            self._answer(request)

    def _answer(self, request: AskReport) -> None:
        server = self.servers.get(request.partition)
        if server is None:
            return
        self._reported_epochs[request.partition] = server.epochs
        records = server.journal.take()
        for observer in self.observers:
            observer.journalled(self, request.partition, records)
        self.tell_soon(Reported(server.report(), request.asked))

    def serve_pending(self, partition: int) -> None:
        """Serve requests that were waiting for a change of a server's state.

        A waiting poll is answered when an epoch has ended. The state is copied for a checkpoint when it can be saved.
        """
        server = self.servers.get(partition)
        if server is None:
            return
        if server.epochs != self._reported_epochs[partition] and partition in self._polls:
            self._answer_poll(self._polls[partition])
        if self._saving is not None and partition not in self._states and server.can_save:
            state = self._states[partition] = server.state()
            for observer in self.observers:
                observer.saved(self, partition, self._saving, state)
            self.tell_soon(Saved(partition, self._saving, server.version.updates, server.epochs))

    def stepped(self) -> None:
        """React to a step of the first partition's server."""
        if self.computations:
            self.computations.call_off_stale(self.servers[0].updates)
        for stepped in self._stepped_hooks:
            stepped(self)


_ACTIONS: dict[type[Any], Callable[[VirtualCluster, Any], None]] = {
    AskReport: VirtualCluster._on_ask_report,
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
