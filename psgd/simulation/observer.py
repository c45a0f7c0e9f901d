"""ClusterObserver: is told what a run on a virtual cluster does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from psgd.core.driver.events import Action, Event
from psgd.core.server.state import ServerState
from psgd_workers.messages import Gradient, Receipt

if TYPE_CHECKING:
    from psgd.simulation.cluster import VirtualCluster

__all__ = ["ClusterObserver"]


class ClusterObserver:
    """Is told what a run does, at the moment it does it. This one ignores everything."""

    def told(self, cluster: VirtualCluster, event: Event) -> None:
        """The coordinator is about to hear of an event."""

    def acted(self, cluster: VirtualCluster, action: Action) -> None:
        """The coordinator wanted this action, and it was carried out, unless the fault plan kept it from that."""

    def started(self, cluster: VirtualCluster, partition: int) -> None:
        """A server started or was restored."""

    def pushed(self, cluster: VirtualCluster, partition: int, gradient: Gradient) -> None:
        """A server took a push; its receipts are still to be delivered."""

    def answered(self, cluster: VirtualCluster, partition: int, receipt: Receipt) -> None:
        """A server gave a receipt, which may be lost."""

    def stepped(self, cluster: VirtualCluster) -> None:
        """The first partition's server made a step, and the others took the same push."""

    def journalled(self, cluster: VirtualCluster, partition: int, records: NDArray[np.void]) -> None:
        """A server handed out the newest records of its journal."""

    def saved(self, cluster: VirtualCluster, partition: int, checkpoint: int, state: ServerState) -> None:
        """A server's state was copied for the checkpoint of that number."""
