"""The supervisor: turns answers of Ray actors into events, and the coordinator's actions into calls of actors.

Each call is kept with its time limit and with the functions that turn its answer or its failure into an event. The loop
waits for all calls at once. There is one exception: it waits for a server's `join` before it does anything else,
because `join` must take effect before the next action.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import inf
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from psgd.cluster.command_inbox import POLL_S, CommandInbox
from psgd.cluster.failures import map_ray_errors, server_failure, worker_failure
from psgd.cluster.placement import choose_node, living_nodes
from psgd.cluster.server_actor import start_server
from psgd.cluster.worker_actor import start_worker
from psgd.core.context import RunContext
from psgd.core.driver.coordinator import Coordinator
from psgd.core.driver.events import (
    Action,
    AskReport,
    Cancel,
    ChangeServer,
    Commit,
    Evaluate,
    Evaluated,
    EvaluationLost,
    Event,
    Finish,
    Grant,
    Join,
    LaneFailed,
    LeaseClosed,
    Leave,
    Note,
    Paused,
    Reported,
    Save,
    SaveFailed,
    Scale,
    ServerLost,
    Skip,
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
from psgd.core.driver.status import RunStatus
from psgd.core.driver.weights_gather import EvaluationRequest, WeightsGather
from psgd.spec import Settings
from psgd.store.checkpoint_writer import CheckpointWriter
from psgd.store.run_directory import RunDirectory
from psgd_workers.messages import FloatArray, Version

__all__ = ["Inputs", "Supervisor"]

RECORDED_EVENTS = (  # written to events.jsonl
    *(WorkerUp, WorkerLost, WorkerFailed, LaneFailed, ServerLost),
    *(SaveFailed, Evaluated, EvaluationLost, Stop, Scale, Paused),
)
PAUSE_S = 1.0  # a loop that comes around later than it wanted by this many seconds was paused
Observer = Callable[[Callable[[float], RunStatus], float], None]


@dataclass(frozen=True, slots=True)
class Inputs:
    """The data that actors are started with."""

    context: RunContext
    dataset: ray.ObjectRef[Any]
    weights: ray.ObjectRef[Any]  # the initial weights


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of an actor that has not returned yet."""

    on_answer: Callable[[Any], Event | None]  # turns the answer into an event
    on_error: Callable[[RayError], Event | None]  # turns an error, or a missing answer, into an event
    deadline: float  # monotonic time, seconds
    actor: Any


class Supervisor:
    """The loop that runs one job to its end.

    Args:
        coordinator: decides which actions follow an event.
        inputs: the data that actors are started with.
        run: the run directory, owned by this driver.
        checkpoint_writer: writes the run's checkpoints.
        observe: called after every event with two arguments: a function that returns the run's status at a given time,
            and the present time.
        check_cluster: called with the present time; raises `ClusterLostError` if the cluster is gone.
        interrupted: returns True once a signal has asked that the run be saved and ended.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        inputs: Inputs,
        run: RunDirectory,
        checkpoint_writer: CheckpointWriter,
        observe: Observer,
        check_cluster: Callable[[float], None],
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self._coordinator = coordinator
        self._inputs = inputs
        self._run = run
        self._checkpoint_writer = checkpoint_writer
        self._observe = observe
        self._check_cluster = check_cluster
        self._interrupted = interrupted
        self._stopping = False  # True once an interruption was handled
        self._inbox = CommandInbox(run, inputs.context.spec)
        self._limits = inputs.context.spec.failure
        self._servers: dict[int, Any] = {}
        self._nodes: dict[int, str] = {}  # partition -> id of its server's node
        self._losses_by_node = Counter[str]()  # node id -> number of servers lost there
        self._workers: dict[str, Any] = {}
        self._calls: dict[ray.ObjectRef[Any], _Call] = {}
        self._events: list[Event] = []
        self._weights_gather = WeightsGather(len(inputs.context.partitions))
        self._finish: Finish | None = None
        self._reported = False  # True once any server has reported
        self._looked_at = inf  # monotonic time at which the last look for answers ended

    def train(self) -> Finish:
        """Run the job until it has ended. Every actor is ended when this method returns or raises.

        Returns:
            The action that ended the run.

        Raises:
            ClusterLostError: the cluster is gone, or refused a call.
        """
        try:
            with map_ray_errors():
                return self._loop()
        finally:
            for actor in [*self._workers.values(), *self._servers.values()]:
                with suppress(RayError):  # raised if the cluster is gone, and the actor with it
                    ray.kill(actor)

    def _loop(self) -> Finish:
        self._events.append(Started())
        while self._finish is None:
            for event in self._next_events():
                self._handle(event)
        return self._finish

    def _handle(self, event: Event) -> None:
        now = time.monotonic()
        self._record(event)  # first, so that the log shows causes before effects
        self._reported = self._reported or isinstance(event, Reported)
        for action in self._coordinator.handle(event, now):
            self._act(action)
        self._observe(self._coordinator.status, now)

    def _record(self, event: Event) -> None:
        if isinstance(event, RECORDED_EVENTS):
            self._run.event(_snake_case(type(event).__name__), **asdict(event))

    # Waiting

    def _next_events(self) -> list[Event]:
        now = time.monotonic()
        self._check_cluster(now)
        self._run.beat(now)
        self._events.extend(self._inbox.poll(now))
        if self._interrupted() and not self._stopping:
            self._stopping = True
            self._events.append(Stop("interrupted"))
        if not self._events:
            self._collect(self._wake_at(now) - now)
            self._notice_pause(time.monotonic())
            self._expire(time.monotonic())
        events, self._events = self._events, []
        return events or [Tick()]

    def _notice_pause(self, now: float) -> None:
        """Do not count time in which this process was stopped, swapped out or waited for storage as others' silence.

        Answers may have arrived meanwhile that have not been read, so no call expires before another look for them.
        """
        paused_s = now - self._looked_at - POLL_S
        self._looked_at = now
        if paused_s < PAUSE_S:
            return
        self._calls = {ref: replace(call, deadline=call.deadline + paused_s) for ref, call in self._calls.items()}
        self._events.insert(0, Paused(paused_s))

    def _wake_at(self, now: float) -> float:
        deadlines = [now + POLL_S, *(call.deadline for call in self._calls.values())]
        deadlines.append(self._coordinator.next_deadline() or inf)
        return max(now, min(deadlines))

    def _collect(self, timeout_s: float) -> None:
        """Turn answers into events. Wait for the first answer at most `timeout_s`."""
        if not self._calls:
            return
        refs = list(self._calls)
        ready, _ = ray.wait(refs, num_returns=1, timeout=timeout_s)
        if ready:
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        for ref in ready:
            call = self._calls.pop(ref, None)
            if call is not None:  # else the failure of an earlier call ended its actor
                self._add_event(self._answer(call, ref))

    def _answer(self, call: _Call, ref: ray.ObjectRef[Any]) -> Event | None:
        try:
            return call.on_answer(ray.get(ref))
        except RayError as error:
            return call.on_error(error)

    def _expire(self, now: float) -> None:
        for ref in [ref for ref, call in self._calls.items() if now >= call.deadline]:
            call = self._calls.pop(ref, None)
            if call is not None:  # else the failure of an earlier call ended its actor
                self._add_event(call.on_error(GetTimeoutError("no answer in time (see failure.timeout_s)")))

    def _add_event(self, event: Event | None) -> None:
        if event is not None:
            self._events.append(event)

    # Acting

    def _act(self, action: Action) -> None:
        match action:
            case StartServer() | StartWorker() | StopWorker():
                self._start_or_stop(action)
            case Join() | Leave() | Skip() | ChangeServer():
                self._tell_servers(action)
            case AskReport(partition, asked, wait):
                self._track_server_call(
                    partition, self._servers[partition].report.remote(wait), lambda report: Reported(report, asked)
                )
            case Save(checkpoint):
                self._save(checkpoint)
            case Commit():
                requeued = self._coordinator.status(time.monotonic()).ledger.requeued
                self._events.append(self._checkpoint_writer.commit(action, requeued))
            case Note(event, fields):
                self._run.event(event, **fields)
            case Finish():
                self._finish = action
            case Grant() | Cancel() | Evaluate():
                self._tell_worker(action)

    def _start_or_stop(self, action: StartServer | StartWorker | StopWorker) -> None:
        inputs = self._inputs
        match action:
            case StartServer(partition):
                self._start_server(partition)
            case StartWorker(name):
                servers = [self._servers[partition] for partition in sorted(self._servers)]
                self._workers[name] = start_worker(inputs.context, name, inputs.dataset, servers)
                self._run.event("worker_started", worker=name)
                ready = self._workers[name].ready.remote()
                self._track_worker_call(name, ready, lambda up: WorkerUp(name, *up), lease=None)
            case StopWorker(name, cause):
                self._run.event("worker_stopped", worker=name, cause=cause)
                if name in self._workers:  # else its death was noticed a moment ago
                    self._end(self._workers.pop(name))

    def _start_server(self, partition: int) -> None:
        """Start the first server of a partition, or restore a lost one from the newest checkpoint.

        Workers are told of a restored server before they get another lease.
        """
        restarted = partition in self._servers
        if restarted:
            self._end(self._servers[partition])
            # Requests that were sent between the server's death and this replacement are lost, too.
            for request in self._weights_gather.lost(partition):
                self._add_event(EvaluationLost(request.worker, request.epochs))
            self._losses_by_node[self._nodes.pop(partition)] += 1
            self._checkpoint_writer.refresh_origin()
        incarnation = self._run.next_incarnation() if restarted else self._run.incarnation
        origin = self._checkpoint_writer.origin
        node = self._nodes[partition] = choose_node(living_nodes(), self._nodes.values(), self._losses_by_node)
        context = self._inputs.context
        # A restored server continues with the present settings. Without a checkpoint it starts with the job's own: its
        # journal must begin with them, and `ChangeServer` follows.
        if origin:
            context = replace(context, spec=self._inbox.spec)
        state = origin or self._inputs.weights
        server = self._servers[partition] = start_server(context, partition, incarnation, state, node)
        checkpoint = origin.manifest.name if origin else None
        self._run.event("server_started", partition=partition, incarnation=incarnation, checkpoint=checkpoint)
        if restarted:
            for name, worker in self._workers.items():
                # Without `hang_up`, a lease that waits for the old server would last until its time limit.
                for ref in (worker.hang_up.remote(partition), worker.reroute.remote(partition, server)):
                    self._track_worker_call(name, ref, lambda _: None, lease=None)

    def _end(self, actor: Any) -> None:
        """End an actor's process and ignore the calls that it has not answered."""
        self._calls = {ref: call for ref, call in self._calls.items() if call.actor is not actor}
        ray.kill(actor)

    def _tell_servers(self, action: Join | Leave | Skip | ChangeServer) -> None:
        for partition, server in self._servers.items():
            match action:
                case Join(worker):
                    self._wait_for_server(partition, server.join.remote(worker))
                case Leave(worker):
                    self._track_server_call(partition, server.leave.remote(worker), lambda _: None)
                case Skip(batch):
                    self._track_server_call(partition, server.skip.remote(batch), lambda _: None)
                case ChangeServer(number, settings) if number == partition:
                    on_answer = partial(self._record_change, partition, settings)
                    self._track_server_call(partition, server.change.remote(settings), on_answer)

    def _wait_for_server(self, partition: int, ref: ray.ObjectRef[Any]) -> None:
        try:
            ray.get(ref, timeout=self._limits.timeout_s)
        except RayError as error:
            self._add_event(self._server_error(partition, self._servers[partition], error))

    def _record_change(self, partition: int, settings: Settings, version: Version) -> None:
        self._run.event("changed", partition=partition, version=version, settings=settings.model_dump(mode="json"))

    def _tell_worker(self, action: Grant | Cancel | Evaluate) -> None:
        if action.worker not in self._workers:
            return  # the worker was lost a moment ago, and an event for the coordinator is under way
        worker = self._workers[action.worker]
        match action:
            case Grant(name, lease):
                ref = worker.work.remote(lease)
                self._track_worker_call(name, ref, lambda end: LeaseClosed(name, lease.id, end.residual_norm), lease.id)
            case Evaluate(name, epochs):
                request = self._weights_gather.begin(name, epochs)
                for partition, server in self._servers.items():
                    on_answer = partial(self._add_part, request, partition)
                    on_refusal = partial(self._drop_request, request)
                    self._track_server_call(partition, server.epoch_weights.remote(epochs), on_answer, on_refusal)
            case Cancel(name, newest):
                self._track_worker_call(name, worker.cancel.remote(newest), lambda _: None, lease=None)

    def _add_part(self, request: EvaluationRequest, partition: int, part: FloatArray) -> None:
        """Add a partition's weights to a request. Start the evaluation once all weights have arrived."""
        parts = self._weights_gather.add(request, partition, part)
        worker = request.worker
        epochs = request.epochs
        if parts is not None and worker in self._workers:
            ref = self._workers[worker].evaluate.remote(*parts)
            self._track_worker_call(worker, ref, lambda result: Evaluated(worker, epochs, result), lease=None)

    def _drop_request(self, request: EvaluationRequest) -> Event | None:
        """Give up an evaluation, because a server does not keep those weights any more."""
        return EvaluationLost(request.worker, request.epochs) if self._weights_gather.give_up(request) else None

    def _track_worker_call(
        self, name: str, ref: ray.ObjectRef[Any], on_answer: Callable[[Any], Event | None], lease: int | None
    ) -> None:
        """Remember a call to a worker until it returns or fails.

        Args:
            name: name of the worker.
            ref: the call.
            on_answer: turns the answer into an event.
            lease: id of the lease if this is a call of `work`; None for other calls.
        """
        # No time limit: the coordinator decides how long a worker may be silent, as servers report the worker's pushes.
        on_error = partial(self._worker_error, name, lease)
        self._calls[ref] = _Call(on_answer, on_error, inf, self._workers[name])

    def _worker_error(self, name: str, lease: int | None, error: RayError) -> Event | None:
        event = worker_failure(name, lease, error)
        if not isinstance(error, RayTaskError) and name in self._workers:
            self._end(self._workers.pop(name))
        return event

    def _track_server_call(
        self,
        partition: int,
        ref: ray.ObjectRef[Any],
        on_answer: Callable[[Any], Event | None],
        on_refusal: Callable[[], Event | None] | None = None,
    ) -> None:
        """Remember a call to a server until it returns, fails or expires.

        Args:
            partition: partition of the server.
            ref: the call.
            on_answer: turns the answer into an event.
            on_refusal: called if the server's method raised. None: such an error counts as the loss of the server.
        """
        server = self._servers[partition]
        limit_s = self._limits.timeout_s + (0 if self._reported else self._limits.start_timeout_s)
        on_error = partial(self._server_error, partition, server, on_refusal=on_refusal)
        self._calls[ref] = _Call(on_answer, on_error, time.monotonic() + limit_s, server)

    def _server_error(
        self, partition: int, server: Any, error: RayError, on_refusal: Callable[[], Event | None] | None = None
    ) -> Event | None:
        if isinstance(error, RayTaskError) and on_refusal is not None:
            return on_refusal()
        if self._servers.get(partition) is not server:
            return None  # the server was replaced already
        self._calls = {ref: call for ref, call in self._calls.items() if call.actor is not server}
        return server_failure(partition, error)

    # Checkpoints

    def _save(self, number: int) -> None:
        name = self._checkpoint_writer.begin(number)
        for partition, server in self._servers.items():
            ref = server.save.remote(name)
            self._track_server_call(partition, ref, partial(self._checkpoint_writer.add_part, number))
            on_error = partial(self._save_failed, partition, server, number)
            # No time limit: the storage has its own, and the server's reports show that it lives.
            self._calls[ref] = replace(self._calls[ref], on_error=on_error, deadline=inf)

    def _save_failed(self, partition: int, server: Any, number: int, error: RayError) -> Event | None:
        cause = error.cause if isinstance(error, RayTaskError) else None
        return SaveFailed(number, str(cause)) if cause else self._server_error(partition, server, error)


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
