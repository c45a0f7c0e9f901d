"""The Ray actor that hosts a `ParameterServer`."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import Future
from math import inf
from threading import Thread
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
from psgd.serving.turns import take_short_turns
from psgd.spec import JobSpec, Settings
from psgd.store.checkpoint_part import Part, write_part
from psgd.store.checkpoints import Checkpoint
from psgd.store.run_directory import RunDirectory
from psgd.store.storage import Storage
from psgd_workers.errors import ListenError, SharedMemoryError
from psgd_workers.messages import BatchId, FloatArray, Gradient, Receipt, Version
from psgd_workers.transport.handshake import Address
from psgd_workers.transport.memory import PublishedVector, has_shared_memory

__all__ = ["ServerActor", "start_server"]

log = logging.getLogger("psgd.lanes")

# A shorter run does not pay for loading compiled code, which takes 0.6 s and saves up to 0.5 ms of each push.
LONG_RUN = 5000  # pushes
LONG_RUN_S = 5.0


class ServerActor:
    """A server's process, which hosts one `ParameterServer`.

    It is an asyncio actor, so a push of the Ray lane that waits for its receipt costs no thread.

    Args:
        context: context of the run.
        number: number of the partition that this server holds.
        incarnation: incarnation of this server.
        origin: initial weights of all partitions, float32 `[num_parameters]`, or the checkpoint to restore.

    Raises:
        StorageError: this machine does not see the driver's storage.
        CheckpointError: the partition cannot be restored from the checkpoint.
    """

    def __init__(self, context: RunContext, number: int, incarnation: int, origin: FloatArray | Checkpoint) -> None:
        take_short_turns()
        return_large_blocks()  # several threads copy weights, for checkpoints and evaluations
        self._storage = Storage(context.storage, context.spec.failure.timeout_s)
        self._check_storage(context.driver)
        self._context = context
        self._partition = partition = context.partitions[number]
        self._published = published = _shared_vector(context.spec, partition.stop - partition.start)
        if isinstance(origin, Checkpoint):
            state = origin.state_for(partition, len(context.partitions))
            now = time.monotonic()
            server = ParameterServer.restore(context.spec, context.grid, state, incarnation, now, published)
            if server.settings != context.spec.settings:  # `psgd set` changed them after this part was saved
                server.change(context.spec.settings, now)
        else:
            part = origin[partition.start : partition.stop]
            server = ParameterServer(context.spec, partition, part, context.grid, Version(incarnation, 0), published)
        self._host = ServerHost(server)
        self._compiles = False  # True once the loading of compiled code has begun
        self._compile_if_useful()
        # Records that were taken from the journal for a checkpoint which could not be written.
        self._unwritten = np.zeros(0, server.journal.type)
        self._writing: asyncio.Task[Part] | None = None  # writes this server's part of a checkpoint
        self._timeout_s = context.spec.failure.timeout_s
        self._listener: Listener | None = None

    def _compile_if_useful(self) -> None:
        """Begin to load compiled code if this mode can use it in a long run. Until it is there, Python serves."""
        if not self._compiles and self._host.server.steps_alone and _is_long(self._context):
            self._compiles = True
            Thread(target=self._host.compile, name="psgd-compile", daemon=True).start()

    def _check_storage(self, driver: str) -> None:
        """Refuse storage that is not the driver's own, such as a folder of the same name on another machine."""
        owner = RunDirectory(self._storage).read_owner()
        if owner is None or owner.driver != driver:
            raise StorageError(
                f"the server's machine does not see the driver's files in {self._storage.url}. Set run.storage to a "
                "folder or URL that every machine shares. If it does, another driver has taken over the run"
            )

    async def address(self) -> Address:
        """Return the address at which this server listens. The first call makes it listen."""
        my_address: Any = ray.util.get_node_ip_address  # Ray's stub is untyped
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
            if spec.scaling.lane != "auto" or spec.scaling.ports:  # else workers use another lane
                listener.close()
                raise
            log.warning("this server does not listen on the network, so workers use another lane: %s", error)
        return listener

    async def pull(self) -> tuple[Version, FloatArray]:
        """Return the version of the published weights, and a copy of them, float32 `[partition size]`."""
        weights = np.empty(self._partition.stop - self._partition.start, np.float32)
        return self._host.pull(weights), weights

    async def version(self) -> Version:
        """Return the version of the published weights."""
        return self._host.server.version

    async def push(self, gradient: Gradient, wants_weights: bool) -> tuple[Receipt, FloatArray | None]:
        """Apply or refuse a gradient. Return its receipt, which may be held back for slower workers.

        Returns:
            The receipt, and a copy of the published weights if the worker wants them.
        """
        answer: Future[tuple[Receipt, FloatArray | None]] = Future()

        def reply(receipt: Receipt) -> None:
            if answer.set_running_or_notify_cancel():  # else the call was cancelled
                # A copy, because Ray serializes the reply later, when a step may be changing the weights.
                answer.set_result((receipt, self._host.server.published.copy() if wants_weights else None))

        self._host.push(gradient, reply)
        return await asyncio.wrap_future(answer)

    async def join(self, worker: str) -> None:
        """Make the coming rounds wait for a worker. The worker gets its lease after this call."""
        self._host.join(worker)

    async def leave(self, worker: str) -> None:
        """Make rounds no longer wait for a worker, because the worker is idle, gone or dead."""
        self._host.leave(worker)

    async def change(self, settings: Settings) -> Version:
        """Change the settings. Return the version from which the new settings hold."""
        version = self._host.change(settings)
        self._compile_if_useful()
        return version

    async def skip(self, batch: BatchId) -> None:
        """Count a batch as settled without its gradient."""
        self._host.skip(batch)

    async def report(self, wait: bool) -> Report:
        """Return a report.

        Args:
            wait: False to report immediately. True to report as soon as an epoch completes, or after a short time.
        """
        return await self._host.report(wait)

    async def epoch_weights(self, epochs: int | None) -> FloatArray:
        """Return a copy of the present weights or of those after an epoch, float32 `[partition size]`.

        Args:
            epochs: number of epochs that were complete when the copy was made; None for the present weights.

        Raises:
            WeightsNotKeptError: this server does not keep that copy any more.
        """
        return self._host.epoch_weights(epochs)

    async def save(self, checkpoint: str) -> Part:
        """Write this partition's part of a checkpoint while training goes on.

        The part holds the state between two rounds. Only one part is written at a time. If an earlier checkpoint was
        given up because another server died, its part may still be in progress; this call waits for it.

        Args:
            checkpoint: name of the checkpoint.

        Raises:
            StorageError: the part cannot be written, or an earlier one is still in progress after the time limit.
        """
        if self._writing is not None:
            await asyncio.wait([self._writing], timeout=self._timeout_s)
        if self._writing is not None:
            raise StorageError(
                f"an earlier checkpoint was still being written after {self._timeout_s} s (see failure.timeout_s)"
            )
        self._writing = asyncio.create_task(self._write(checkpoint))
        return await self._writing

    async def _write(self, checkpoint: str) -> Part:
        try:
            state, records = await self._host.snapshot(self._timeout_s)
            journal = self._unwritten = np.concatenate([self._unwritten, records])
            part = await asyncio.to_thread(write_part, self._storage, checkpoint, state, journal)
            self._unwritten = journal[:0]
            return part
        finally:
            self._writing = None


def _is_long(context: RunContext) -> bool:
    run = context.spec.run
    pushes = inf if run.epochs is None else run.epochs * context.grid.num_batches
    return min(pushes, run.max_updates or inf) >= LONG_RUN and (run.max_time_s or inf) >= LONG_RUN_S


def _shared_vector(spec: JobSpec, size: int) -> PublishedVector | None:
    """Return the shared memory in which workers of this node read the weights; None if no worker reads them there."""
    if spec.scaling.lane in ("tcp", "ray") or not has_shared_memory():
        return None
    try:
        return PublishedVector(size)
    except SharedMemoryError as error:
        log.warning("this server cannot share memory with workers of its node, so they use another lane: %s", error)
        return None


def start_server(
    context: RunContext, number: int, incarnation: int, origin: ray.ObjectRef[Any] | Checkpoint, node: str
) -> ActorHandle[Any]:
    """Start a server's process. It asks Ray for no CPU, because a server computes only when a worker pushes.

    Args:
        context: context of the run.
        number: number of the partition that the server holds.
        incarnation: incarnation of the server.
        origin: reference to the initial weights, or the checkpoint to restore.
        node: Ray's id of the node to start the server on. If that node is gone, Ray chooses another.

    Returns:
        The handle of the actor.
    """
    options: dict[str, Any] = {
        "num_cpus": 0,
        # A request of one byte makes Ray place the actor directly. Without any request, Ray sends it to a random node
        # first, and waits if that node is cut off.
        "memory": 1,
        "max_concurrency": 4 * context.spec.scaling.most_workers + 16,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True),
    }
    actor: Any = ray.remote(ServerActor)
    handle: ActorHandle[Any] = actor.options(**options).remote(context, number, incarnation, origin)
    return handle
