"""The Ray actor that hosts a `Worker`."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle

from psgd.cluster.lanes import route
from psgd.core.context import RunContext
from psgd.job import build_worker
from psgd_workers.data import Dataset
from psgd_workers.errors import LaneError
from psgd_workers.messages import Evaluation, FloatArray, Lease, LeaseEnd
from psgd_workers.transport.lane import LaneKind

__all__ = ["WorkerActor", "start_worker"]


class WorkerActor:
    """A worker's process, which hosts one `Worker`.

    Leases and evaluations run one after the other; `cancel` and `hang_up` run beside them, in a thread of their own.

    Args:
        context: context of the run.
        name: name of the worker.
        dataset: the data set, as read-only views of the node's copy in the object store.
        servers: handles of the server actors, by partition.
    """

    def __init__(self, context: RunContext, name: str, dataset: Dataset, servers: Sequence[ActorHandle[Any]]) -> None:
        self._validation = dataset.validation
        self._newest_cancelled = -1  # leases up to this id are cancelled
        self._servers = list(servers)
        node = ray.get_runtime_context().get_node_id()
        routes = [
            route(context.spec, name, partition, partial(self._servers.__getitem__, partition.number), node)
            for partition in context.partitions
        ]
        self._worker = build_worker(context.spec, name, dataset, context.layout, routes)

    def ready(self) -> tuple[str, tuple[LaneKind, ...]]:
        """Return `host:pid` and the lanes to the servers, or no lanes if a server cannot be reached at present."""
        with suppress(LaneError):  # a server may be restarting; the first lease connects again
            self._worker.connect()
        return f"{socket.gethostname()}:{os.getpid()}", self._worker.lane_kinds

    def work(self, lease: Lease) -> LeaseEnd:
        """Work through a lease. Return how it ended."""
        return self._worker.work(lease, lambda: lease.id <= self._newest_cancelled)

    def reroute(self, partition: int, server: ActorHandle[Any]) -> None:
        """Replace the server of a partition. The next lease connects to it."""
        self._servers[partition] = server
        self._worker.disconnect()

    @ray.method(concurrency_group="control")
    def hang_up(self, partition: int) -> None:
        """Stop waiting for a server that is gone. A lease that waits for it ends.

        Args:
            partition: partition of the server.
        """
        self._worker.hang_up(partition)

    def evaluate(self, *parts: FloatArray) -> Evaluation:
        """Evaluate weights on the validation examples.

        Args:
            parts: the weights, float32 `[partition size]` for each partition, in order.
        """
        assert self._validation is not None
        return self._worker.evaluate(np.concatenate(parts), self._validation)

    @ray.method(concurrency_group="control")
    def cancel(self, lease: int) -> None:
        """End all leases up to the id `lease`. The worker finishes the batch that it is computing."""
        self._newest_cancelled = max(self._newest_cancelled, lease)


def start_worker(
    context: RunContext, name: str, dataset: ray.ObjectRef[Any], servers: Sequence[ActorHandle[Any]]
) -> ActorHandle[Any]:
    """Start a worker's process. Ray lets NumPy (BLAS) use as many threads as the worker has CPUs.

    Args:
        context: context of the run.
        name: name of the worker.
        dataset: reference to the data set in the object store.
        servers: handles of the server actors, by partition.

    Returns:
        The handle of the actor.
    """
    scaling = context.spec.scaling
    remote: Any = ray.remote  # Ray's stubs declare no concurrency groups
    actor = remote(concurrency_groups={"control": 1})(WorkerActor)
    options = {"num_cpus": scaling.cpus_per_worker, "num_gpus": scaling.gpus_per_worker}
    handle: ActorHandle[Any] = actor.options(**options).remote(context, name, dataset, servers)
    return handle
