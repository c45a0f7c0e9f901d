"""The core's objects as Ray actors, and Ray's exceptions as ours."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from psgd.checkpoints import Checkpoint, Part, write_part
from psgd.cluster.host import ServerHost
from psgd.cluster.lanes import push_form, route
from psgd.cluster.listener import Listener
from psgd.core.events import LaneFailed, ServerLost, WorkerFailed, WorkerLost
from psgd.core.journal import RECORD
from psgd.core.report import Report
from psgd.core.server import ParameterServer, Partition
from psgd.errors import StorageError
from psgd.job import build_worker
from psgd.spec import JobSpec, Settings
from psgd.storage import Storage
from psgd_workers.datasets import Dataset
from psgd_workers.errors import LaneError, WorkerError
from psgd_workers.handshake import Address
from psgd_workers.lanes import LaneKind
from psgd_workers.layout import Layout
from psgd_workers.memory import PublishedVector, has_shared_memory
from psgd_workers.messages import (
    BatchId,
    EpochGrid,
    Evaluation,
    FloatArray,
    Gradient,
    Lease,
    LeaseEnd,
    Receipt,
    Version,
)

__all__ = ["RunFacts", "server_failure", "start_server", "start_worker", "worker_failure"]

log = logging.getLogger("psgd.lanes")


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What every actor of a run is told."""

    spec: JobSpec
    layout: Layout
    grid: EpochGrid
    partitions: tuple[Partition, ...]
    driver: str  # id of the run's owner
    storage: str  # URL of the run directory


class ServerActor:
    """Hosts one `ParameterServer`; an asyncio actor, so that parked pushes of the Ray lane cost no thread.

    Args:
        facts: of the run.
        number: which partition.
        incarnation: of this server.
        origin: `[num_parameters]`, the initial weights of all partitions; or the checkpoint to restore.
    """

    def __init__(self, facts: RunFacts, number: int, incarnation: int, origin: FloatArray | Checkpoint) -> None:
        self._run = Storage(facts.storage, facts.spec.failure.timeout_s)
        self._check_storage(facts.driver)
        self._facts = facts
        self._partition = partition = facts.partitions[number]
        self._published = published = _shared_vector(facts.spec, partition.stop - partition.start)
        if isinstance(origin, Checkpoint):
            state = origin.cut(partition, len(facts.partitions))
            now = time.monotonic()
            server = ParameterServer.restore(facts.spec, facts.grid, state, incarnation, now, published)
            if server.settings != facts.spec.settings:  # they were changed after this part was saved
                server.change(facts.spec.settings, now)
        else:
            part = origin[partition.start : partition.stop]
            server = ParameterServer(facts.spec, partition, part, facts.grid, Version(incarnation, 0), published)
        self._host = ServerHost(server)
        self._unwritten = np.zeros(0, RECORD)  # of the journal, taken for a checkpoint that could not be written
        self._writing: asyncio.Task[Part] | None = None  # a part of a checkpoint
        self._timeout_s = facts.spec.failure.timeout_s
        self._listener: Listener | None = None

    def _check_storage(self, driver: str) -> None:
        """The storage must be the driver's own, not a folder of that name on another machine."""
        if not self._run.exists("owner") or json.loads(self._run.read("owner"))["driver"] != driver:
            raise StorageError(
                f"the server's machine does not see the driver's files in {self._run.url}: "
                "run.storage must be a folder or URL that every machine shares"
            )

    async def address(self) -> Address:
        """Where this server listens; from the first call on, it does."""
        my_address: Any = ray.util.get_node_ip_address  # its stub is untyped
        host = str(my_address())
        if self._listener is None:
            self._listener = self._listen(host)
        return self._listener.address(ray.get_runtime_context().get_node_id(), host)

    def _listen(self, host: str) -> Listener:
        spec, partition = self._facts.spec, self._partition
        part, form = slice(partition.start, partition.stop), push_form(spec, partition)
        listener = Listener(self._host, form, self._facts.layout.num_parameters, part, self._published)
        try:
            if self._published:
                listener.listen_unix()
            if spec.scaling.lane != "shm":
                listener.listen_tcp(host, spec.scaling.ports)
        except LaneError as error:
            if spec.scaling.lane != "auto" or spec.scaling.ports:  # else another lane may do
                listener.close()
                raise
            log.warning("this server listens on no network: %s", error)
        return listener

    async def pull(self) -> tuple[Version, FloatArray]:
        """The published weights."""
        weights = np.empty(self._partition.stop - self._partition.start, np.float32)
        return self._host.pull(weights), weights

    async def version(self) -> Version:
        """Of the published weights."""
        return self._host.server.version

    async def push(self, gradient: Gradient, wants_weights: bool) -> tuple[Receipt, FloatArray | None]:
        """Returns when the receipt is due."""
        due: Future[tuple[Receipt, FloatArray | None]] = Future()

        def reply(receipt: Receipt) -> None:
            if due.set_running_or_notify_cancel():  # else the call was cancelled
                # A copy, as the reply is serialised later, when a step may be under way.
                due.set_result((receipt, self._host.server.published.copy() if wants_weights else None))

        self._host.push(gradient, reply)
        return await asyncio.wrap_future(due)

    async def join(self, worker: str) -> None:
        """The worker gets a lease."""
        self._host.join(worker)

    async def leave(self, worker: str) -> None:
        """The worker has no lease any more."""
        self._host.leave(worker)

    async def change(self, settings: Settings) -> Version:
        """Go on by other settings, from the version that is returned."""
        return self._host.change(settings)

    async def skip(self, batch: BatchId, examples: int) -> None:
        """Do without a batch."""
        self._host.skip(batch, examples)

    async def report(self, wait: bool) -> Report:
        """At once, or when an epoch completes, or after a moment."""
        return await self._host.report(wait)

    async def epoch_weights(self, epochs: int | None) -> FloatArray:
        """The copy made when so many epochs were complete; None: the weights as they are."""
        return self._host.epoch_weights(epochs)

    async def save(self, checkpoint: str) -> Part:
        """Write this partition's part of a checkpoint, between two rounds, while training goes on.

        One at a time: what was given up because another server died may still be being written.
        """
        if self._writing is not None:
            await asyncio.wait([self._writing], timeout=self._timeout_s)
        if self._writing is not None:
            raise StorageError(f"an earlier checkpoint was still being written after {self._timeout_s} s")
        self._writing = asyncio.create_task(self._write(checkpoint))
        return await self._writing

    async def _write(self, checkpoint: str) -> Part:
        try:
            state, records = await self._host.snapshot(self._timeout_s)
            journal = self._unwritten = np.concatenate([self._unwritten, records])
            part = await asyncio.to_thread(write_part, self._run, checkpoint, state, journal)
            self._unwritten = journal[:0]
            return part
        finally:
            self._writing = None


def _shared_vector(spec: JobSpec, size: int) -> PublishedVector | None:
    """Where workers of this node read the weights; None: they do not, or there is no such memory."""
    if spec.scaling.lane in ("tcp", "ray") or not has_shared_memory():
        return None
    try:
        return PublishedVector(size)
    except LaneError as error:
        log.warning("this server shares no memory: %s", error)
        return None


class WorkerActor:
    """Hosts one `Worker`: leases and evaluations run one after the other, `cancel` and `hang_up` beside them.

    Args:
        facts: of the run.
        name: of the worker.
        dataset: read-only views of the node's copy in the object store.
        servers: by partition.
    """

    def __init__(self, facts: RunFacts, name: str, dataset: Dataset, servers: Sequence[ActorHandle[Any]]) -> None:
        self._validation = dataset.validation
        self._cancelled = -1  # leases up to this one are
        self._servers = list(servers)
        node = ray.get_runtime_context().get_node_id()
        routes = [
            route(facts.spec, name, partition, partial(self._servers.__getitem__, partition.number), node)
            for partition in facts.partitions
        ]
        self._worker = build_worker(facts.spec, name, dataset, facts.layout, routes)

    def ready(self) -> tuple[str, tuple[LaneKind, ...]]:
        """Its `host:pid` and its lanes, once it is built; no lanes if a server cannot be reached just now."""
        with suppress(LaneError):  # it may be on its way back; the first lease tells
            self._worker.connect()
        return f"{socket.gethostname()}:{os.getpid()}", self._worker.lanes

    def work(self, lease: Lease) -> LeaseEnd:
        """Work through a lease."""
        return self._worker.work(lease, lambda: lease.id <= self._cancelled)

    def reroute(self, partition: int, server: ActorHandle[Any]) -> None:
        """A partition has another server from now on."""
        self._servers[partition] = server
        self._worker.disconnect()

    @ray.method(concurrency_group="control")
    def hang_up(self, partition: int) -> None:
        """A partition's server is gone: a lease that waits for it ends now."""
        self._worker.hang_up(partition)

    def evaluate(self, *parts: FloatArray) -> Evaluation:
        """Validate the weights whose partitions these are."""
        assert self._validation is not None
        return self._worker.evaluate(np.concatenate(parts), self._validation)

    @ray.method(concurrency_group="control")
    def cancel(self, lease: int) -> None:
        """End leases up to this one after the batch in hand."""
        self._cancelled = max(self._cancelled, lease)


def start_server(
    facts: RunFacts, number: int, incarnation: int, origin: ray.ObjectRef[Any] | Checkpoint, node: str
) -> ActorHandle[Any]:
    """Start a server's process on a node, or elsewhere if that is gone.

    It asks Ray for no CPU, as it computes only when somebody pushes.
    """
    options: dict[str, Any] = {
        "num_cpus": 0,
        # A byte: who asks for nothing is placed by way of any node, and waits for it if that one is cut off.
        "memory": 1,
        "max_concurrency": 4 * facts.spec.scaling.most_workers + 16,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True),
    }
    actor: Any = ray.remote(ServerActor)
    handle: ActorHandle[Any] = actor.options(**options).remote(facts, number, incarnation, origin)
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
    died = isinstance(error, RayActorError) and not error.actor_init_failed
    return ServerLost(partition, _last_line(error), died)


def _last_line(error: Exception) -> str:
    """Ray's messages end with the reason."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
