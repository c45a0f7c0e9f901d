"""The supervisor: events in, actions out, around the coordinator, with Ray on the other side.

Every call to an actor is noted with what its answer, its error and its silence mean; the loop waits for whichever
comes first. The loop never waits for one thing alone, but for joins, which must be done before the next action.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from psgd.cluster.command_inbox import POLL_S, CommandInbox
from psgd.cluster.failures import refusals, server_failure, worker_failure
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
from psgd_workers.messages import BatchId, FloatArray, Version

__all__ = ["Inputs", "Supervisor"]

RECORDED = (
    *(WorkerUp, WorkerLost, WorkerFailed, LaneFailed, ServerLost),
    *(SaveFailed, Evaluated, EvaluationLost, Stop, Scale),
)
Observer = Callable[[Callable[[float], RunStatus], float], None]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the actors are started with."""

    context: RunContext
    dataset: ray.ObjectRef[Any]
    weights: ray.ObjectRef[Any]  # initial
    examples: Callable[[BatchId], int]  # in a batch


@dataclass(frozen=True, slots=True)
class _Call:
    """A call under way."""

    answered: Callable[[Any], Event | None]
    failed: Callable[[RayError], Event | None]
    deadline: float
    actor: Any  # whose calls are forgotten when it is ended


class Supervisor:
    """Runs one job to its end.

    Args:
        coordinator: decides.
        inputs: for the actors.
        run: the run directory, owned.
        saves: its checkpoints.
        observe: called after every event with the time, and a function that makes the status of a time.
        check_cluster: given the time, raises a `ClusterLostError` if the cluster is gone.
        interrupted: returns True once the run is to be saved and ended, by a signal.
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
        self._stopping = False  # because of an interruption
        self._inbox = CommandInbox(run, inputs.context.spec)
        self._limits = inputs.context.spec.failure
        self._servers: dict[int, Any] = {}
        self._nodes: dict[int, str] = {}  # that servers were started on
        self._lost_on = Counter[str]()  # how many servers, by node
        self._workers: dict[str, Any] = {}
        self._calls: dict[ray.ObjectRef[Any], _Call] = {}
        self._events: list[Event] = []
        self._weights_gather = WeightsGather(len(inputs.context.partitions))
        self._finish: Finish | None = None
        self._reported = False  # True once a server of the first start has reported

    def train(self) -> Finish:
        """Run the job. Every actor that was started is gone when this returns or raises.

        Raises:
            ClusterLostError: the cluster is gone, or refuses a call.
        """
        try:
            with refusals():
                return self._loop()
        finally:
            for actor in [*self._workers.values(), *self._servers.values()]:
                with suppress(RayError):  # if the cluster is gone, the actor is
                    ray.kill(actor)

    def _loop(self) -> Finish:
        self._events.append(Started())
        while self._finish is None:
            for event in self._next_events():
                self._handle(event)
        return self._finish

    def _handle(self, event: Event) -> None:
        now = time.monotonic()
        self._record(event)  # before what follows from it
        self._reported = self._reported or isinstance(event, Reported)
        for action in self._coordinator.handle(event, now):
            self._act(action)
        self._observe(self._coordinator.status, now)

    def _record(self, event: Event) -> None:
        if isinstance(event, RECORDED):
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
            self._expire(time.monotonic())
        events, self._events = self._events, []
        return events or [Tick()]

    def _wake_at(self, now: float) -> float:
        deadlines = [now + POLL_S, *(call.deadline for call in self._calls.values())]
        deadlines.append(self._coordinator.next_deadline() or float("inf"))
        return max(now, min(deadlines))

    def _collect(self, timeout_s: float) -> None:
        """Turn answers into events, waiting for the first at most so long."""
        if not self._calls:
            return
        refs = list(self._calls)
        ready, _ = ray.wait(refs, num_returns=1, timeout=timeout_s)
        if ready:
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        for ref in ready:
            call = self._calls.pop(ref, None)
            if call is not None:  # else its actor was found dead a moment ago
                self._note(self._answer(call, ref))

    def _answer(self, call: _Call, ref: ray.ObjectRef[Any]) -> Event | None:
        try:
            return call.answered(ray.get(ref))
        except RayError as error:
            return call.failed(error)

    def _expire(self, now: float) -> None:
        for ref in [ref for ref, call in self._calls.items() if now >= call.deadline]:
            call = self._calls.pop(ref, None)
            if call is not None:  # else its actor was given up for another call a moment ago
                self._note(call.failed(GetTimeoutError("no answer in time (see failure.timeout_s)")))

    def _note(self, event: Event | None) -> None:
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
                self._call_server(
                    partition, self._servers[partition].report.remote(wait), lambda report: Reported(report, asked)
                )
            case Save(checkpoint):
                self._save(checkpoint)
            case Commit():
                requeued = self._coordinator.status(time.monotonic()).ledger.requeued
                self._events.append(self._checkpoint_writer.commit(action, requeued))
            case Note(event, context):
                self._run.event(event, **context)
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
                self._call_worker(name, ready, lambda up: WorkerUp(name, *up), lease=None)
            case StopWorker(name, cause):
                self._run.event("worker_stopped", worker=name, cause=cause)
                if name in self._workers:  # else it was found dead a moment ago
                    self._end(self._workers.pop(name))

    def _start_server(self, partition: int) -> None:
        """The first of a partition, or the next: of the newest checkpoint, known to every worker before it can work."""
        restarted = partition in self._servers
        if restarted:
            self._end(self._servers[partition])
            for asked in self._weights_gather.lost(
                partition
            ):  # also who asked it when it was dead, but not yet replaced
                self._note(EvaluationLost(asked.worker, asked.epochs))
            self._lost_on[self._nodes.pop(partition)] += 1
            self._checkpoint_writer.find_origin()
        incarnation = self._run.next_incarnation() if restarted else self._run.incarnation
        origin = self._checkpoint_writer.origin
        node = self._nodes[partition] = choose_node(living_nodes(), self._nodes.values(), self._lost_on)
        context = self._inputs.context
        if origin:  # to the settings of now; who begins anew goes by those of the start, as its journal does
            context = replace(context, spec=self._inbox.spec)
        state = origin or self._inputs.weights
        server = self._servers[partition] = start_server(context, partition, incarnation, state, node)
        checkpoint = origin.manifest.name if origin else None
        self._run.event("server_started", partition=partition, incarnation=incarnation, checkpoint=checkpoint)
        if restarted:
            for name, worker in self._workers.items():
                # A lease that waits for the old server would do so until its time limit, and what follows it as well.
                for told in (worker.hang_up.remote(partition), worker.reroute.remote(partition, server)):
                    self._call_worker(name, told, lambda _: None, lease=None)

    def _end(self, actor: Any) -> None:
        """End an actor's process and hear no more of it."""
        self._calls = {ref: call for ref, call in self._calls.items() if call.actor is not actor}
        ray.kill(actor)

    def _tell_servers(self, action: Join | Leave | Skip | ChangeServer) -> None:
        for partition, server in self._servers.items():
            match action:
                case Join(worker):
                    self._await_server(partition, server.join.remote(worker))
                case Leave(worker):
                    self._call_server(partition, server.leave.remote(worker), lambda _: None)
                case Skip(batch):
                    examples = self._inputs.examples(batch)
                    self._call_server(partition, server.skip.remote(batch, examples), lambda _: None)
                case ChangeServer(number, settings) if number == partition:
                    changed = partial(self._changed, partition, settings)
                    self._call_server(partition, server.change.remote(settings), changed)

    def _await_server(self, partition: int, ref: ray.ObjectRef[Any]) -> None:
        try:
            ray.get(ref, timeout=self._limits.timeout_s)
        except RayError as error:
            self._note(self._server_error(partition, self._servers[partition], error))

    def _changed(self, partition: int, settings: Settings, version: Version) -> None:
        self._run.event("changed", partition=partition, version=version, settings=settings.model_dump(mode="json"))

    def _tell_worker(self, action: Grant | Cancel | Evaluate) -> None:
        if action.worker not in self._workers:
            return  # it was lost a moment ago, and the coordinator will hear of it
        worker = self._workers[action.worker]
        match action:
            case Grant(name, lease):
                ref = worker.work.remote(lease)
                self._call_worker(name, ref, lambda end: LeaseClosed(name, lease.id, end.residual_norm), lease.id)
            case Evaluate(name, epochs):
                asked = self._weights_gather.begin(name, epochs)
                for partition, server in self._servers.items():
                    gathered = partial(self._evaluate, asked, partition)
                    refused = partial(self._give_up, asked)
                    self._call_server(partition, server.epoch_weights.remote(epochs), gathered, refused)
            case Cancel(name, newest):
                self._call_worker(name, worker.cancel.remote(newest), lambda _: None, lease=None)

    def _evaluate(self, asked: EvaluationRequest, partition: int, part: FloatArray) -> None:
        """Let a worker evaluate once every partition's weights are there."""
        parts = self._weights_gather.add(asked, partition, part)
        worker = asked.worker
        epochs = asked.epochs
        if parts is not None and worker in self._workers:
            ref = self._workers[worker].evaluate.remote(*parts)
            self._call_worker(worker, ref, lambda result: Evaluated(worker, epochs, result), lease=None)

    def _give_up(self, asked: EvaluationRequest) -> Event | None:
        """A server has no such weights any more."""
        return EvaluationLost(asked.worker, asked.epochs) if self._weights_gather.give_up(asked) else None

    def _call_worker(
        self, name: str, ref: ray.ObjectRef[Any], answered: Callable[[Any], Event | None], lease: int | None
    ) -> None:
        # How long a worker may be silent is the coordinator's to judge: it hears of its pushes from the servers.
        failed = partial(self._worker_error, name, lease)
        self._calls[ref] = _Call(answered, failed, float("inf"), self._workers[name])

    def _worker_error(self, name: str, lease: int | None, error: RayError) -> Event | None:
        event = worker_failure(name, lease, error)
        if not isinstance(error, RayTaskError) and name in self._workers:
            self._end(self._workers.pop(name))
        return event

    def _call_server(
        self,
        partition: int,
        ref: ray.ObjectRef[Any],
        answered: Callable[[Any], Event | None],
        refused: Callable[[], Event | None] | None = None,
    ) -> None:
        """Call a server; an answer that is an error means that it is lost, unless `refused` says what it means."""
        server = self._servers[partition]
        patience = self._limits.timeout_s + (0 if self._reported else self._limits.start_timeout_s)
        failed = partial(self._server_error, partition, server, refused=refused)
        self._calls[ref] = _Call(answered, failed, time.monotonic() + patience, server)

    def _server_error(
        self, partition: int, server: Any, error: RayError, refused: Callable[[], Event | None] | None = None
    ) -> Event | None:
        if isinstance(error, RayTaskError) and refused is not None:
            return refused()
        if self._servers.get(partition) is not server:
            return None  # it has a successor already
        self._calls = {ref: call for ref, call in self._calls.items() if call.actor is not server}
        return server_failure(partition, error)

    # Checkpoints

    def _save(self, number: int) -> None:
        name = self._checkpoint_writer.begin(number)
        for partition, server in self._servers.items():
            ref = server.save.remote(name)
            self._call_server(partition, ref, partial(self._checkpoint_writer.take, number))
            failed = partial(self._save_failed, partition, server, number)
            # How long writing may take is the storage's to say; that the server lives is seen by its reports.
            self._calls[ref] = replace(self._calls[ref], failed=failed, deadline=float("inf"))

    def _save_failed(self, partition: int, server: Any, number: int, error: RayError) -> Event | None:
        cause = error.cause if isinstance(error, RayTaskError) else None
        return SaveFailed(number, str(cause)) if cause else self._server_error(partition, server, error)


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
