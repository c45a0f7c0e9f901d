"""The network of a virtual cluster: it carries messages between workers and servers, as its fault plan lets it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
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
        cluster: whose workers and servers it connects.
        faults: what is lost, late or doubled.
    """

    def __init__(self, cluster: VirtualCluster, faults: FaultPlan) -> None:
        self._cluster = cluster
        self._faults = faults

    def versions(self, worker: str) -> list[Version] | None:
        """Return the present version of each partition; None if some server does not answer that worker."""
        cluster = self._cluster
        partitions = range(len(cluster.parts))
        if len(cluster.servers) < len(partitions):
            return None
        if not all(self._faults.reaches(worker, partition) for partition in partitions):
            return None
        return [cluster.servers[partition].version for partition in partitions]

    def pull(self, worker: str) -> tuple[list[Version], FloatArray] | None:
        """Return the versions by partition and the weights shown now; None if some server does not answer that worker.

        The weights of a single server are its own memory, which the next step changes.
        """
        versions = self.versions(worker)
        if versions is None:
            return None
        shown = [self._cluster.servers[partition].published for partition in range(len(versions))]
        return versions, shown[0] if len(shown) == 1 else np.concatenate(shown)

    def push(self, worker: VirtualWorker, slot: PipelineSlot, gradients: Sequence[Gradient]) -> None:
        """Send a worker's gradient, cut by partition, to the servers."""
        limit_s = self._faults.receipt_limit_s
        if limit_s is not None:
            self._cluster.after(limit_s, self._expire, worker, worker.pushes, slot, gradients[0].batch)
        fault = self._faults.push(worker.name, worker.pushes - 1, len(gradients))
        if fault is None:
            self._arrive(worker, slot, dict(enumerate(gradients)))
            return
        self._strike(worker, fault)
        arrivals: dict[float, dict[int, Gradient]] = defaultdict(dict)
        for partition, (gradient, copies) in enumerate(zip(gradients, fault.copies, strict=True)):
            for delay_s in copies:
                arrivals[delay_s][partition] = gradient
        for delay_s, arriving in arrivals.items():
            if delay_s:
                self._cluster.after(delay_s, self._arrive, worker, slot, arriving)
            else:
                self._arrive(worker, slot, arriving)

    def _strike(self, worker: VirtualWorker, fault: PushFault) -> None:
        match fault.worker:
            case "dies":
                self._cluster.lose_worker(worker.name, fault.cause, fault.preempted)
            case "hangs":
                worker.alive = False
            case "loses its lane":
                worker.lose_lane("no receipt came")

    def _arrive(self, worker: VirtualWorker, slot: PipelineSlot, gradients: Mapping[int, Gradient]) -> None:
        """Parts of a push reach their servers at the same moment."""
        cluster = self._cluster
        lead = cluster.servers.get(0)
        updates = lead.version.updates if lead else 0
        refused = [partition for partition, part in gradients.items() if not self._take(partition, part)]
        if lead and cluster.servers.get(0) is lead and lead.version.updates != updates:
            cluster.stepped()
        if any(slot.batch == gradients[number].batch and slot.outcomes[number] is None for number in refused):
            worker.lose_lane("no receipt came")

    def _take(self, partition: int, gradient: Gradient) -> bool:
        """Let a server take a push; false: there is no server, or it refuses the push."""
        cluster = self._cluster
        server = cluster.servers.get(partition)
        if server is None:
            return False
        try:
            server.check(gradient)
        except PushRefusedError:
            return False
        receipts = server.push(gradient, cluster.now)
        for observer in cluster.observers:
            observer.pushed(cluster, partition, gradient)
        self.deliver(partition, receipts)
        cluster.notice(partition)
        self._faults.arrived(partition)
        return True

    def deliver(self, partition: int, receipts: tuple[Receipt, ...]) -> None:
        """Send receipts, each with the weights that the server shows at this moment."""
        cluster = self._cluster
        for receipt in receipts:
            for observer in cluster.observers:
                observer.answered(cluster, partition, receipt)
            worker = cluster.workers.get(receipt.worker)
            delay_s = self._faults.receipt(partition, receipt)
            if worker is None or delay_s is None:
                continue
            shown = cluster.servers[partition].published
            if delay_s:
                cluster.after(delay_s, worker.receive, partition, receipt, shown.copy())
            else:
                worker.receive(partition, receipt, shown)

    @staticmethod
    def _expire(worker: VirtualWorker, push: int, slot: PipelineSlot, batch: BatchId) -> None:
        if slot.batch == batch and push > worker.pushes - len(worker.slots):
            worker.lose_lane("no receipt in time")
