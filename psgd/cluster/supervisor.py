"""The supervisor: events in, actions out, around the coordinator, with Ray on the other side.

Every call to an actor is noted with what its answer, its error and its silence mean; the loop waits for whichever
comes first. The loop never waits for one thing alone, but for joins, which must be done before the next action.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from psgd.checkpoints import Checkpoint, Checkpoints, Manifest, Part
from psgd.cluster.actors import RunFacts, server_failure, start_server, start_worker, worker_failure
from psgd.core.coordinator import Coordinator
from psgd.core.events import (
    Action,
    AskReport,
    Cancel,
    Change,
    ChangeServer,
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
    ServerLost,
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
from psgd.errors import SpecError, StorageError
from psgd.jobfile import change_settings
from psgd.monitoring.rundir import RunDirectory
from psgd.spec import Settings
from psgd_workers.messages import Version

__all__ = ["Inputs", "Supervisor"]

COMMANDS_S = 0.5  # between two looks for commands
RECORDED = (WorkerUp, WorkerLost, WorkerFailed, LaneFailed, ServerLost, SaveFailed, Evaluated, Stop)
Observer = Callable[[Coordinator, float], None]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the actors are started with."""

    facts: RunFacts
    dataset: ray.ObjectRef[Any]
    weights: ray.ObjectRef[Any] | None  # for a new run
    checkpoint: Checkpoint | None  # for a resumed one
    data_fingerprint: str


@dataclass(frozen=True, slots=True)
class _Call:
    """A call under way."""

    answered: Callable[[Any], Event | None]
    failed: Callable[[RayError], Event | None]
    deadline: float
    worker: str | None = None  # whose calls are forgotten when it is stopped


class Supervisor:
    """Runs one job to its end.

    Args:
        coordinator: decides.
        inputs: for the actors.
        run: the run directory, owned.
        observe: shown the coordinator and the time after every event.
    """

    def __init__(self, coordinator: Coordinator, inputs: Inputs, run: RunDirectory, observe: Observer) -> None:
        self._coordinator = coordinator
        self._inputs = inputs
        self._run = run
        self._observe = observe
        self._spec = inputs.facts.spec
        self._checkpoints = Checkpoints(run.storage)
        self._servers: dict[int, Any] = {}
        self._workers: dict[str, Any] = {}
        self._calls: dict[ray.ObjectRef[Any], _Call] = {}
        self._events: list[Event] = []
        self._parts: dict[int, Part] = {}
        self._commands_at = 0.0
        self._finish: Finish | None = None

    def stop(self, event: Stop) -> None:
        """Ask for the run's end; safe to call from a signal handler."""
        self._events.append(event)

    def train(self) -> Finish:
        """The loop. Every actor it started is gone when it returns or raises."""
        try:
            self._events.append(Started())
            while self._finish is None:
                for event in self._next_events():
                    self._handle(event)
            return self._finish
        finally:
            for actor in [*self._workers.values(), *self._servers.values()]:
                ray.kill(actor)

    def _handle(self, event: Event) -> None:
        now = time.monotonic()
        for action in self._coordinator.handle(event, now):
            self._act(action)
        self._record(event)
        self._observe(self._coordinator, now)

    def _record(self, event: Event) -> None:
        if isinstance(event, RECORDED):
            self._run.event(_snake_case(type(event).__name__), **asdict(event))

    # Waiting

    def _next_events(self) -> list[Event]:
        now = time.monotonic()
        self._poll_commands(now)
        if not self._events:
            self._collect(self._wake_at(now) - now)
            self._expire(time.monotonic())
        events, self._events = self._events, []
        return events or [Tick()]

    def _wake_at(self, now: float) -> float:
        deadlines = [now + COMMANDS_S, *(call.deadline for call in self._calls.values())]
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
            if call is not None:  # else its worker was found dead a moment ago
                self._note(self._answer(call, ref))

    def _answer(self, call: _Call, ref: ray.ObjectRef[Any]) -> Event | None:
        try:
            return call.answered(ray.get(ref))
        except RayError as error:
            return call.failed(error)

    def _expire(self, now: float) -> None:
        for ref, call in list(self._calls.items()):
            if now >= call.deadline:
                del self._calls[ref]
                self._note(call.failed(ray.exceptions.GetTimeoutError("no answer in time (see failure.timeout_s)")))

    def _note(self, event: Event | None) -> None:
        if event is not None:
            self._events.append(event)

    def _poll_commands(self, now: float) -> None:
        if now < self._commands_at:
            return
        self._commands_at = now + COMMANDS_S
        for command in self._run.take_commands():
            try:
                self._events.append(self._understood(command))
                self._run.event("command", **command, accepted=True)
            except SpecError as error:
                self._run.event("command", **command, accepted=False, reason=str(error))

    def _understood(self, command: dict[str, Any]) -> Stop | Change:
        match command["command"]:
            case "stop":
                return Stop("stopped")
            case "set":
                self._spec = change_settings(self._spec, command["settings"])
                return Change(self._spec.settings)
            case unknown:
                raise SpecError(f"{unknown!r} is no command; there are stop and set")

    # Acting

    def _act(self, action: Action) -> None:
        match action:
            case StartServer() | StartWorker() | StopWorker():
                self._start_or_stop(action)
            case Join() | Leave():
                self._tell_servers(action)
            case ChangeServer(partition, settings):
                self._change(partition, settings)
            case AskReport(partition, asked, wait):
                self._ask(partition, asked, wait)
            case Save(checkpoint):
                self._save(checkpoint)
            case Commit():
                self._commit(action)
            case Finish():
                self._finish = action
            case Grant() | Cancel() | Evaluate():
                self._tell_worker(action)

    def _start_or_stop(self, action: StartServer | StartWorker | StopWorker) -> None:
        inputs = self._inputs
        match action:
            case StartServer(partition):
                self._servers[partition] = start_server(inputs.facts, partition, inputs.weights, inputs.checkpoint)
            case StartWorker(name):
                servers = [self._servers[partition] for partition in sorted(self._servers)]
                self._workers[name] = start_worker(inputs.facts, name, inputs.dataset, servers)
                self._run.event("worker_started", worker=name)
                ready = self._workers[name].ready.remote()
                self._call_worker(name, ready, lambda up: WorkerUp(name, *up), lease=None)
            case StopWorker(name, cause):
                self._run.event("worker_stopped", worker=name, cause=cause)
                self._forget(name)

    def _forget(self, name: str) -> None:
        """End a worker's process and hear no more of it."""
        self._calls = {ref: call for ref, call in self._calls.items() if call.worker != name}
        ray.kill(self._workers.pop(name))

    def _tell_servers(self, action: Join | Leave) -> None:
        method = "join" if isinstance(action, Join) else "leave"
        told = [(p, getattr(server, method).remote(action.worker)) for p, server in self._servers.items()]
        for partition, ref in told:
            if isinstance(action, Leave):
                self._call(ref, lambda _: None, partial(server_failure, partition))
                continue
            try:
                ray.get(ref, timeout=self._spec.failure.timeout_s)
            except RayError as error:
                self._events.append(server_failure(partition, error))

    def _change(self, partition: int, settings: Settings) -> None:
        ref = self._servers[partition].change.remote(settings)
        self._call(ref, partial(self._changed, partition, settings), partial(server_failure, partition))

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
                parts = [self._servers[p].epoch_weights.remote(epochs) for p in sorted(self._servers)]
                ref = worker.evaluate.remote(*parts)
                self._call_worker(name, ref, lambda evaluation: Evaluated(name, epochs, evaluation), lease=None)
            case Cancel(name):
                self._call_worker(name, worker.cancel.remote(), lambda _: None, lease=None)

    def _ask(self, partition: int, asked: int, wait: bool) -> None:
        ref = self._servers[partition].report.remote(wait)
        self._call(ref, lambda report: Reported(report, asked), partial(server_failure, partition))

    def _call_worker(
        self, name: str, ref: ray.ObjectRef[Any], answered: Callable[[Any], Event | None], lease: int | None
    ) -> None:
        # How long a worker may be silent is the coordinator's to judge: it hears of its pushes from the servers.
        self._calls[ref] = _Call(answered, partial(self._worker_error, name, lease), float("inf"), name)

    def _worker_error(self, name: str, lease: int | None, error: RayError) -> Event | None:
        event = worker_failure(name, lease, error)
        if not isinstance(error, RayTaskError) and name in self._workers:
            self._forget(name)
        return event

    def _call(
        self,
        ref: ray.ObjectRef[Any],
        answered: Callable[[Any], Event | None],
        failed: Callable[[RayError], Event | None],
    ) -> None:
        limits = self._spec.failure
        patience = limits.timeout_s + (0 if self._coordinator.reports else limits.start_timeout_s)
        self._calls[ref] = _Call(answered, failed, time.monotonic() + patience)

    # Checkpoints

    def _save(self, number: int) -> None:
        self._parts = {}
        name = f"{number:06d}-{self._inputs.facts.incarnation}"
        for partition, server in self._servers.items():
            self._call(
                server.save.remote(name),
                lambda part: self._saved(part, number),
                partial(self._save_failed, partition, number),
            )

    def _saved(self, part: Part, number: int) -> Event:
        self._parts[part.partition] = part
        return Saved(part.partition, number, part.updates, part.epochs)

    def _save_failed(self, partition: int, number: int, error: RayError) -> Event:
        cause = error.cause if isinstance(error, RayTaskError) else None
        return SaveFailed(number, str(cause)) if cause else server_failure(partition, error)

    def _commit(self, commit: Commit) -> None:
        self._run.check_owner()
        manifest = self._manifest(commit)
        try:
            self._checkpoints.commit(manifest)
            deleted = self._checkpoints.prune(self._spec.checkpoint.keep)
        except StorageError as error:
            self._events.append(SaveFailed(commit.checkpoint, str(error)))
            return
        self._run.event("checkpoint", name=manifest.name, updates=commit.updates, epochs=commit.epochs, deleted=deleted)
        self._events.append(Committed(commit.checkpoint))

    def _manifest(self, commit: Commit) -> Manifest:
        facts = self._inputs.facts
        return Manifest(
            format=1,
            name=f"{commit.checkpoint:06d}-{facts.incarnation}",
            incarnation=facts.incarnation,
            updates=commit.updates,
            epochs=commit.epochs,
            seed=self._spec.seed,
            spec_hash=self._inputs.facts.spec.identity_hash(),
            settings=next(iter(self._parts.values())).settings,  # the saved ones: newer ones may be on their way
            data_fingerprint=self._inputs.data_fingerprint,
            names=facts.layout.names,
            shapes=facts.layout.shapes,
            num_trainable=facts.layout.num_trainable,
            partitions=len(facts.partitions),
            requeued=self._coordinator.ledger.requeued,
            files={name: checksum for part in self._parts.values() for name, checksum in part.files.items()},
            journal={name: checksum for part in self._parts.values() for name, checksum in part.journal.items()},
        )


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
