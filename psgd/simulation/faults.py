"""FaultPlan: what fails on a virtual cluster. The cluster asks it whenever something could fail."""

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
    """What happens to one push, and to the worker that sends it.

    Attributes:
        copies: by partition, how many seconds after it was sent each copy of the push arrives; empty: none does.
        worker: what becomes of the worker. A worker that hangs never does anything again.
        cause: of the worker's death.
        preempted: true if the worker's node was preempted.
    """

    copies: Sequence[Sequence[float]]
    worker: Literal["works on", "dies", "hangs", "loses its lane"] = "works on"
    cause: str = "scripted"
    preempted: bool = False


class FaultPlan:
    """No faults. Subclasses say what fails.

    Attributes:
        receipt_limit_s: time after which a worker gives up waiting for a receipt. None: it waits for ever, as nothing
            is lost.
    """

    receipt_limit_s: float | None = None

    def begin(self, cluster: VirtualCluster) -> None:
        """Learn which cluster this is, and schedule the faults that come at a given time."""

    def push(self, worker: str, number: int, partitions: int) -> PushFault | None:
        """Decide what happens to a worker's push of that number, from 0. None: it arrives at once, everywhere."""
        return None

    def receipt(self, partition: int, receipt: Receipt) -> float | None:
        """Return how many seconds later a receipt comes. None: never."""
        return 0.0

    def reaches(self, worker: str, partition: int) -> bool:
        """Return True if the worker and the partition's server can exchange messages."""
        return True

    def arrived(self, partition: int) -> None:
        """A push has reached the partition's server, which may die now."""

    def allows(self, action: Action) -> bool:
        """Return True if the cluster is to carry out an action of the coordinator."""
        return True


class Crashes(FaultPlan):
    """Workers are killed while the run trains, one at a time.

    Args:
        next_s: gives the seconds until the next one is killed; asked again after each.
        seed: decides which worker is killed.
    """

    def __init__(self, next_s: Callable[[], float], seed: int) -> None:
        self._next_s = next_s
        self._random = np.random.default_rng(seed)

    def begin(self, cluster: VirtualCluster) -> None:
        """Schedule the first crash."""
        cluster.after(self._next_s(), self._crash, cluster)

    def _crash(self, cluster: VirtualCluster) -> None:
        if cluster.workers and cluster.status.phase == "training":
            names = sorted(cluster.workers)
            cluster.lose_worker(names[int(self._random.integers(len(names)))])
        cluster.after(self._next_s(), self._crash, cluster)
