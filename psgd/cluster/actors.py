"""The core's objects as Ray actors, and Ray's exceptions as ours."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError

from psgd.checkpoints import Checkpoint, Part, write_part
from psgd.cluster.lanes import RayLane, Receipts
from psgd.core.events import LaneFailed, ServerLost, WorkerFailed, WorkerLost
from psgd.core.journal import RECORD
from psgd.core.report import Report
from psgd.core.server import ParameterServer, Partition, ServerState
from psgd.errors import StorageError
from psgd.job import build_worker
from psgd.spec import JobSpec, Settings
from psgd.storage import Storage
from psgd_workers.datasets import Dataset
from psgd_workers.errors import LaneError, WorkerError
from psgd_workers.layout import Layout
from psgd_workers.messages import EpochGrid, Evaluation, FloatArray, Gradient, Lease, LeaseEnd, Receipt, Version
from psgd_workers.worker import Route

__all__ = ["RunFacts", "server_failure", "start_server", "start_worker", "worker_failure"]

REPORT_S = 0.2  # a waiting report is given after this time at the latest


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What every actor of a run is told."""

    spec: JobSpec
    layout: Layout
    grid: EpochGrid
    partitions: tuple[Partition, ...]
    incarnation: int
    driver: str  # id of the run's owner
    storage: str  # URL of the run directory


class ServerActor:
    """Hosts one `ParameterServer`; an asyncio actor, so that parked pushes and waiting reports cost no thread.

    Args:
        facts: of the run.
        number: which partition.
        weights: `[num_parameters]`, of all partitions; None to restore a checkpoint.
        checkpoint: what to restore.
    """

    def __init__(self, facts: RunFacts, number: int, weights: FloatArray | None, checkpoint: Checkpoint | None) -> None:
        self._run = Storage(facts.storage)
        self._check_storage(facts.driver)
        partition = facts.partitions[number]
        if checkpoint is not None:
            state = checkpoint.state(number)
            now = time.monotonic()
            self._server = ParameterServer.restore(facts.spec, facts.grid, state, facts.incarnation, now)
        else:
            assert weights is not None
            part = weights[partition.start : partition.stop]
            version = Version(facts.incarnation, 0)
            self._server = ParameterServer(facts.spec, partition, part, facts.grid, version)
        self._receipts = Receipts(self._server)
        self._epochs = self._server.epochs
        self._news = asyncio.Event()  # an epoch is complete
        self._snapshot: asyncio.Future[tuple[ServerState, NDArray[np.void]]] | None = None  # wanted between rounds
        self._unwritten = np.zeros(0, RECORD)  # of the journal, taken for a checkpoint that could not be written
        self._timeout_s = facts.spec.failure.timeout_s

    def _check_storage(self, driver: str) -> None:
        """The storage must be the driver's own, not a folder of that name on another machine."""
        if not self._run.exists("owner") or json.loads(self._run.read("owner"))["driver"] != driver:
            raise StorageError(
                f"the server's machine does not see the driver's files in {self._run.url}: "
                "run.storage must be a folder or URL that every machine shares"
            )

    async def pull(self) -> tuple[Version, FloatArray]:
        """The published weights."""
        return self._server.version, self._server.published.copy()

    async def version(self) -> Version:
        """Of the published weights."""
        return self._server.version

    async def push(self, gradient: Gradient, wants_weights: bool) -> tuple[Receipt, FloatArray | None]:
        """Returns when the receipt is due."""
        reply = self._receipts.push(gradient, time.monotonic())
        self._notify()
        receipt, weights = await reply
        return receipt, weights if wants_weights else None

    async def join(self, worker: str) -> None:
        """The worker gets a lease."""
        self._receipts.deliver(self._server.join(worker, time.monotonic()))

    async def leave(self, worker: str) -> None:
        """The worker has no lease any more."""
        self._receipts.deliver(self._server.leave(worker, time.monotonic()))
        self._notify()

    async def change(self, settings: Settings) -> Version:
        """Go on by other settings, from the version that is returned."""
        self._receipts.deliver(self._server.change(settings, time.monotonic()))
        self._notify()
        return self._server.version

    def _notify(self) -> None:
        """Serve who waits for an epoch's end, or for a moment between rounds."""
        if self._server.epochs != self._epochs:
            self._epochs = self._server.epochs
            self._news.set()
        if self._snapshot is not None and self._server.can_save:
            self._snapshot.set_result((self._server.state(), self._server.journal.take()))
            self._snapshot = None

    async def report(self, wait: bool) -> Report:
        """At once, or when an epoch completes, or after a moment."""
        if wait:
            await _wait(self._news, REPORT_S)
        self._news.clear()
        return self._server.report()

    async def epoch_weights(self, epochs: int | None) -> FloatArray:
        """The copy made when so many epochs were complete; None: the weights as they are."""
        return self._server.epoch_weights(epochs)

    async def save(self, checkpoint: str) -> Part:
        """Write this partition's part of a checkpoint, between two rounds, while training goes on."""
        wanted = self._snapshot = asyncio.get_running_loop().create_future()
        self._notify()
        try:
            state, records = await asyncio.wait_for(wanted, self._timeout_s)
        except TimeoutError as error:
            self._snapshot = None
            raise StorageError(f"no round closed within {self._timeout_s} s, and half a round is no state") from error
        journal = self._unwritten = np.concatenate([self._unwritten, records])
        part = await asyncio.to_thread(write_part, self._run, checkpoint, state, journal)
        self._unwritten = journal[:0]
        return part


class WorkerActor:
    """Hosts one `Worker`: leases and evaluations run one after the other, `cancel` beside them.

    Args:
        facts: of the run.
        name: of the worker.
        dataset: read-only views of the node's copy in the object store.
        servers: by partition.
    """

    def __init__(self, facts: RunFacts, name: str, dataset: Dataset, servers: Sequence[ActorHandle[Any]]) -> None:
        self._validation = dataset.validation
        self._cancelled = False
        routes = [
            Route(slice(partition.start, partition.stop), RayLane(server))
            for partition, server in zip(facts.partitions, servers, strict=True)
        ]
        self._worker = build_worker(facts.spec, name, dataset, facts.layout, routes)

    def ready(self) -> str:
        """Returns its `host:pid` once the worker is built."""
        return f"{socket.gethostname()}:{os.getpid()}"

    def work(self, lease: Lease) -> LeaseEnd:
        """Work through a lease."""
        return self._worker.work(lease, lambda: self._cancelled)

    def evaluate(self, *parts: FloatArray) -> Evaluation:
        """Validate the weights whose partitions these are."""
        assert self._validation is not None
        return self._worker.evaluate(np.concatenate(parts), self._validation)

    @ray.method(concurrency_group="control")
    def cancel(self) -> None:
        """End the present lease after the batch in hand, and every later one at once."""
        self._cancelled = True


async def _wait(event: asyncio.Event, limit_s: float) -> bool:
    """Whether the event came within the limit."""
    try:
        return await asyncio.wait_for(event.wait(), limit_s)
    except TimeoutError:
        return False


def start_server(
    facts: RunFacts, number: int, weights: ray.ObjectRef[Any] | None, checkpoint: Checkpoint | None
) -> ActorHandle[Any]:
    """Start a server's process; it asks Ray for no CPU, as it computes only when somebody pushes."""
    options = {"num_cpus": 0, "max_concurrency": 4 * facts.spec.scaling.workers + 16}
    actor: Any = ray.remote(ServerActor)
    handle: ActorHandle[Any] = actor.options(**options).remote(facts, number, weights, checkpoint)
    return handle


def start_worker(
    facts: RunFacts, name: str, dataset: ray.ObjectRef[Any], servers: Sequence[ActorHandle[Any]]
) -> ActorHandle[Any]:
    """Start a worker's process. Ray gives it as many BLAS threads as CPUs."""
    scaling = facts.spec.scaling
    remote: Any = ray.remote  # its stubs do not know concurrency groups
    actor = remote(concurrency_groups={"control": 1})(WorkerActor)
    options = {"num_cpus": scaling.cpus_per_worker, "num_gpus": scaling.gpus_per_worker}
    handle: ActorHandle[Any] = actor.options(**options).remote(facts, name, dataset, servers)
    return handle


def worker_failure(worker: str, lease: int | None, error: RayError) -> WorkerLost | WorkerFailed | LaneFailed:
    """What a failed call to a worker means."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        if isinstance(cause, LaneError) and lease is not None:
            return LaneFailed(worker, lease, str(cause))
        return WorkerFailed(worker, str(cause) if isinstance(cause, WorkerError) else f"{error}")
    if isinstance(error, RayActorError):
        return WorkerLost(worker, _last_line(error), preempted=bool(error.preempted))
    return WorkerLost(worker, _last_line(error))


def server_failure(partition: int, error: RayError) -> ServerLost:
    """What a failed call to a server means."""
    return ServerLost(partition, _last_line(error))


def _last_line(error: Exception) -> str:
    """Ray's messages end with the reason."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
