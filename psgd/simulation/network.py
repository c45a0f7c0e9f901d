"""The network of a virtual cluster. It delivers messages between workers and servers as the fault plan allows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from psgd.errors import PushRefusedError
from psgd.simulation.faults import FaultPlan, PushFault
from psgd.simulation.worker import VirtualWorker
from psgd_workers.loop import PipelineSlot
from psgd_workers.messages import BatchId, FloatArray, Gradient, Receipt, Version

if TYPE_CHECKING:
    from psgd.simulation.cluster import VirtualCluster

__all__ = ["Network"]


class Network:
    """Delivers pushes, receipts and weights.

    Args:
        cluster: cluster whose workers and servers it connects.
        faults: plan of the messages that are lost, delayed or doubled.
    """

    def __init__(self, cluster: VirtualCluster, faults: FaultPlan) -> None:
        self._cluster = cluster
        self._faults = faults

    def versions(self, worker: str) -> list[Version] | None:
        """Return the current version of each partition, or None if a server does not answer the worker."""
        cluster = self._cluster
        partitions = range(len(cluster.parts))
        if len(cluster.servers) < len(partitions):
            return None
        if not all(self._faults.reaches(worker, partition) for partition in partitions):
            return None
        return [cluster.servers[partition].version for partition in partitions]

    def pull(self, worker: str) -> tuple[list[Version], FloatArray] | None:
        """Return the versions by partition and the published weights, or None if a server does not answer the worker.

        The weights of a single server are its own memory, which its next step changes.
        """
        versions = self.versions(worker)
        if versions is None:
            return None
        slices = [self._cluster.servers[partition].published for partition in range(len(versions))]
        return versions, slices[0] if len(slices) == 1 else np.concatenate(slices)

    def push(self, worker: VirtualWorker, slot: PipelineSlot, gradients: Sequence[Gradient]) -> None:
        """Send a worker's gradient, cut by partition, to the servers."""
        limit_s = self._faults.receipt_limit_s
        if limit_s is not None:
            self._cluster.after(limit_s, self._expire, worker, worker.pushes, slot, gradients[0].batch)
        fault = self._faults.push(worker.name, worker.pushes - 1, len(gradients))
        if fault is None:
            self._arrive(worker, slot, worker.lane, enumerate(gradients))
            return
        lane = worker.lane
        self._disturb(worker, fault)
        arrivals: dict[float, dict[int, Gradient]] = defaultdict(dict)
        for partition, (gradient, copies) in enumerate(zip(gradients, fault.copies, strict=True)):
            for delay_s in copies:
                arrivals[delay_s][partition] = gradient
        for delay_s, arriving in arrivals.items():
            if delay_s:
                self._cluster.after(delay_s, self._arrive, worker, slot, lane, arriving.items())
            else:
                self._arrive(worker, slot, lane, arriving.items())

    def _disturb(self, worker: VirtualWorker, fault: PushFault) -> None:
        """Apply a fault to the worker."""
        match fault.worker:
            case "dies":
                self._cluster.lose_worker(worker.name, fault.cause, fault.preempted)
            case "hangs":
                worker.alive = False
            case "loses its lane":
                worker.lose_lane("no receipt came")

    def _arrive(
        self, worker: VirtualWorker, slot: PipelineSlot, lane: int, parts: Iterable[tuple[int, Gradient]]
    ) -> None:
        """Deliver parts of a push, each with its partition, that reach their servers at the same time."""
        servers = self._cluster.servers
        first = servers.get(0)
        updates = first.updates if first else 0
        refused = []
        for partition, part in parts:
            if not self._push(partition, part, lane):
                refused.append((partition, part.batch))
        if first and servers.get(0) is first and first.updates != updates:
            self._cluster.stepped()
        if refused and any(slot.batch == batch and slot.outcomes[number] is None for number, batch in refused):
            worker.lose_lane("no receipt came")

    def _push(self, partition: int, gradient: Gradient, lane: int) -> bool:
        """Push to a partition's server. Return False if there is no server or it refuses the push."""
        cluster = self._cluster
        path = cluster.push_paths.get(partition)
        if path is None:
            return False
        try:
            receipts = path.push(gradient, cluster.now)
        except PushRefusedError:
            return False
        for pushed in cluster.pushed_hooks:
            pushed(cluster, partition, gradient)
        if receipts and not path.lanes:  # the usual case: no push waits, so the one receipt is for this push
            self._deliver(partition, receipts[0], lane)
        else:
            path.lanes.setdefault((gradient.worker, gradient.batch), []).append(lane)
            self.deliver(partition, receipts)
        cluster.serve_pending(partition)
        self._faults.arrived(partition)
        return True

    def deliver(self, partition: int, receipts: tuple[Receipt, ...]) -> None:
        """Send receipts to their workers, each with the weights that the server publishes now."""
        waiting = self._cluster.push_paths[partition].lanes
        for receipt in receipts:
            key = (receipt.worker, receipt.batch)
            lane = waiting[key].pop(0)
            if not waiting[key]:
                del waiting[key]
            self._deliver(partition, receipt, lane)

    def _deliver(self, partition: int, receipt: Receipt, lane: int) -> None:
        """Send a receipt to its worker, by the lane that carried the push."""
        cluster = self._cluster
        for answered in cluster.answered_hooks:
            answered(cluster, partition, receipt)
        worker = cluster.workers.get(receipt.worker)
        delay_s = self._faults.receipt(partition, receipt)
        if worker is None or delay_s is None:
            return
        published = cluster.servers[partition].published
        if delay_s:
            cluster.after(delay_s, worker.receive, partition, receipt, published.copy(), lane)
        else:
            worker.receive(partition, receipt, published, lane)

    @staticmethod
    def _expire(worker: VirtualWorker, push: int, slot: PipelineSlot, batch: BatchId) -> None:
        """End the worker's lease if a receipt of its push is still missing.

        Args:
            worker: the worker.
            push: number of the push among those of the worker, from 1.
            slot: slot of the push.
            batch: batch of the push.
        """
        if slot.batch == batch and push > worker.pushes - len(worker.slots):
            worker.lose_lane("no receipt in time")
