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
    """Hosts one `Worker`. Leases and evaluations run one after the other; `cancel` and `hang_up` run beside them.

    Args:
        context: the run's context.
        name: name of the worker.
        dataset: read-only views of the node's copy in the object store.
        servers: server actors by partition.
    """

    def __init__(self, context: RunContext, name: str, dataset: Dataset, servers: Sequence[ActorHandle[Any]]) -> None:
        self._validation = dataset.validation
        self._cancelled = -1  # leases up to this id are cancelled
        self._servers = list(servers)
        node = ray.get_runtime_context().get_node_id()
        routes = [
            route(context.spec, name, partition, partial(self._servers.__getitem__, partition.number), node)
            for partition in context.partitions
        ]
        self._worker = build_worker(context.spec, name, dataset, context.layout, routes)

    def ready(self) -> tuple[str, tuple[LaneKind, ...]]:
        """Return `host:pid` and the lanes to the servers; no lanes if a server cannot be reached at present."""
        with suppress(LaneError):  # the server may be restarting; the first lease connects again
            self._worker.connect()
        return f"{socket.gethostname()}:{os.getpid()}", self._worker.lane_kinds

    def work(self, lease: Lease) -> LeaseEnd:
        """Work through a lease."""
        return self._worker.work(lease, lambda: lease.id <= self._cancelled)

    def reroute(self, partition: int, server: ActorHandle[Any]) -> None:
        """Connect to a partition's new server from the next lease on."""
        self._servers[partition] = server
        self._worker.disconnect()

    @ray.method(concurrency_group="control")
    def hang_up(self, partition: int) -> None:
        """End a lease that waits for a partition's server, which is gone."""
        self._worker.hang_up(partition)

    def evaluate(self, *parts: FloatArray) -> Evaluation:
        """Evaluate the weights, given as one part per partition, on the validation examples."""
        assert self._validation is not None
        return self._worker.evaluate(np.concatenate(parts), self._validation)

    @ray.method(concurrency_group="control")
    def cancel(self, lease: int) -> None:
        """End leases up to this one after the batch in hand."""
        self._cancelled = max(self._cancelled, lease)


def start_worker(
    context: RunContext, name: str, dataset: ray.ObjectRef[Any], servers: Sequence[ActorHandle[Any]]
) -> ActorHandle[Any]:
    """Start a worker's process. Ray gives it one BLAS thread per CPU of the worker."""
    scaling = context.spec.scaling
    remote: Any = ray.remote  # its stubs do not know concurrency groups
    actor = remote(concurrency_groups={"control": 1})(WorkerActor)
    options = {"num_cpus": scaling.cpus_per_worker, "num_gpus": scaling.gpus_per_worker}
    handle: ActorHandle[Any] = actor.options(**options).remote(context, name, dataset, servers)
    return handle
