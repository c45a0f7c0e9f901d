"""A `ParameterServer` as a Ray actor."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import Future
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from psgd.cluster.lanes import push_format_of
from psgd.core.context import RunContext
from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.report import Report
from psgd.errors import StorageError
from psgd.serving.host import ServerHost
from psgd.serving.listener import Listener
from psgd.serving.malloc import return_large_blocks
from psgd.spec import JobSpec, Settings
from psgd.store.checkpoints import Checkpoint, Part, write_part
from psgd.store.run_directory import RunDirectory
from psgd.store.storage import Storage
from psgd_workers.errors import ListenError, SharedMemoryError
from psgd_workers.messages import BatchId, FloatArray, Gradient, Receipt, Version
from psgd_workers.transport.handshake import Address
from psgd_workers.transport.memory import PublishedVector, has_shared_memory

__all__ = ["ServerActor", "start_server"]

log = logging.getLogger("psgd.lanes")


class ServerActor:
    """Hosts one `ParameterServer`; an asyncio actor, so that parked pushes of the Ray lane cost no thread.

    Args:
        facts: of the run.
        number: which partition.
        incarnation: of this server.
        origin: `[num_parameters]`, the initial weights of all partitions; or the checkpoint to restore.
    """

    def __init__(self, context: RunContext, number: int, incarnation: int, origin: FloatArray | Checkpoint) -> None:
        return_large_blocks()  # weights are copied in several threads, for checkpoints and evaluations
        self._run = Storage(context.storage, context.spec.failure.timeout_s)
        self._check_storage(context.driver)
        self._context = context
        self._partition = partition = context.partitions[number]
        self._published = published = _shared_vector(context.spec, partition.stop - partition.start)
        if isinstance(origin, Checkpoint):
            state = origin.cut(partition, len(context.partitions))
            now = time.monotonic()
            server = ParameterServer.restore(context.spec, context.grid, state, incarnation, now, published)
            if server.settings != context.spec.settings:  # they were changed after this part was saved
                server.change(context.spec.settings, now)
        else:
            part = origin[partition.start : partition.stop]
            server = ParameterServer(context.spec, partition, part, context.grid, Version(incarnation, 0), published)
        self._host = ServerHost(server)
        self._unwritten = np.zeros(
            0, server.journal.type
        )  # of the journal, taken for a checkpoint that could not be written
        self._writing: asyncio.Task[Part] | None = None  # a part of a checkpoint
        self._timeout_s = context.spec.failure.timeout_s
        self._listener: Listener | None = None

    def _check_storage(self, driver: str) -> None:
        """The storage must be the driver's own, not a folder of that name on another machine."""
        owner = RunDirectory(self._run).read_owner()
        if owner is None or owner.driver != driver:
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
        spec = self._context.spec
        partition = self._partition
        part = slice(partition.start, partition.stop)
        push_format = push_format_of(spec, partition)
        listener = Listener(self._host, push_format, self._context.layout.num_parameters, part, self._published)
        try:
            if self._published:
                listener.listen_unix()
            if spec.scaling.lane != "shm":
                listener.listen_tcp(host, spec.scaling.ports)
        except ListenError as error:
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
    except SharedMemoryError as error:
        log.warning("this server shares no memory: %s", error)
        return None


def start_server(
    context: RunContext, number: int, incarnation: int, origin: ray.ObjectRef[Any] | Checkpoint, node: str
) -> ActorHandle[Any]:
    """Start a server's process on a node, or elsewhere if that is gone.

    It asks Ray for no CPU, as it computes only when somebody pushes.
    """
    options: dict[str, Any] = {
        "num_cpus": 0,
        # A byte: who asks for nothing is placed by way of any node, and waits for it if that one is cut off.
        "memory": 1,
        "max_concurrency": 4 * context.spec.scaling.most_workers + 16,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True),
    }
    actor: Any = ray.remote(ServerActor)
    handle: ActorHandle[Any] = actor.options(**options).remote(context, number, incarnation, origin)
    return handle
