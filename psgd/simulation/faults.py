"""Fault plans: decide what fails on a virtual cluster, which consults its plan whenever something could fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from psgd.core.driver.events import Action
from psgd_workers.messages import Receipt

if TYPE_CHECKING:
    from psgd.simulation.cluster import VirtualCluster

__all__ = ["Crashes", "FaultPlan", "PushFault"]


@dataclass(frozen=True, slots=True)
class PushFault:
    """The fate of one push and of the worker that sends it.

    Attributes:
        copies: by partition, one entry for each copy that arrives: the virtual seconds between sending and arrival. A
            partition with no entry does not receive the push.
        worker: fate of the worker. A worker that hangs never does anything again.
        cause: reason that the driver is given for the worker's death.
        preempted: true if the worker's node was preempted.
    """

    copies: Sequence[Sequence[float]]
    worker: Literal["works on", "dies", "hangs", "loses its lane"] = "works on"
    cause: str = "scripted"
    preempted: bool = False


class FaultPlan:
    """A plan without faults. Subclasses override the methods for the faults that they inject.

    Attributes:
        receipt_limit_s: virtual seconds after which a worker stops waiting for a receipt. None: it waits forever, which
            suits a plan that loses no message.
    """

    receipt_limit_s: float | None = None

    def begin(self, cluster: VirtualCluster) -> None:
        """Receive the cluster, and schedule the faults that happen at a given time."""

    def push(self, worker: str, number: int, partitions: int) -> PushFault | None:
        """Decide the fate of one push.

        Args:
            worker: name of the worker that sends it.
            number: number of the push among the worker's pushes, from 0.
            partitions: number of partitions.

        Returns:
            The fault, or None if the push arrives at every partition without delay.
        """
        return None

    def receipt(self, partition: int, receipt: Receipt) -> float | None:
        """Return the delay of a receipt in virtual seconds, or None if it is lost."""
        return 0.0

    def reaches(self, worker: str, partition: int) -> bool:
        """Return True if the worker and the partition's server can exchange messages."""
        return True

    def arrived(self, partition: int) -> None:
        """React to a push that the partition's server has handled, for example by killing the server."""

    def allows(self, action: Action) -> bool:
        """Return True if the cluster carries out this action of the coordinator."""
        return True


class Crashes(FaultPlan):
    """A plan that kills workers while the run trains, one at a time.

    Args:
        next_s: function that draws the virtual seconds until the next worker is killed.
        seed: seed of the draws that choose the worker.
    """

    def __init__(self, next_s: Callable[[], float], seed: int) -> None:
        self._next_s = next_s
        self._random = np.random.default_rng(seed)

    def begin(self, cluster: VirtualCluster) -> None:
        """Schedule the first death of a worker."""
        cluster.after(self._next_s(), self._crash, cluster)

    def _crash(self, cluster: VirtualCluster) -> None:
        if cluster.workers and cluster.status.phase == "training":
            names = sorted(cluster.workers)
            cluster.lose_worker(names[int(self._random.integers(len(names)))])
        cluster.after(self._next_s(), self._crash, cluster)
