"""ClusterObserver: the hooks through which tests and reports follow a run on a virtual cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from psgd.core.driver.events import Action, Event
from psgd.core.server.state import ServerState
from psgd_workers.messages import Gradient, Receipt

if TYPE_CHECKING:
    from psgd.simulation.cluster import VirtualCluster

__all__ = ["ClusterObserver", "overridden"]


class ClusterObserver:
    """Hooks that a virtual cluster calls as its run proceeds. Every hook of this base class does nothing."""

    def event_received(self, cluster: VirtualCluster, event: Event) -> None:
        """Follow an event, just before the coordinator handles it."""

    def acted(self, cluster: VirtualCluster, action: Action) -> None:
        """Follow an action of the coordinator, after it was carried out or the fault plan prevented it."""

    def started(self, cluster: VirtualCluster, partition: int) -> None:
        """Follow the start or the restoration of a partition's server."""

    def pushed(self, cluster: VirtualCluster, partition: int, gradient: Gradient) -> None:
        """Follow a push that a server handled, before the resulting receipts are delivered."""

    def answered(self, cluster: VirtualCluster, partition: int, receipt: Receipt) -> None:
        """Follow a receipt that a server sends. The fault plan may still lose it."""

    def stepped(self, cluster: VirtualCluster) -> None:
        """Follow a step of the first partition's server, after the other servers handled the same push."""

    def journalled(self, cluster: VirtualCluster, partition: int, records: NDArray[np.void]) -> None:
        """Follow the newest records of a server's journal, as they are handed to the driver."""

    def saved(self, cluster: VirtualCluster, partition: int, checkpoint: int, state: ServerState) -> None:
        """Follow the copy of a server's state that was made for the checkpoint with this number."""


def overridden(observers: Sequence[ClusterObserver], hook: str) -> tuple[Callable[..., None], ...]:
    """Return a hook of each observer that overrides it. Use it for hooks of every push, most of which do nothing.

    Args:
        observers: the observers.
        hook: name of the hook.
    """
    nothing = getattr(ClusterObserver, hook)
    return tuple(getattr(observer, hook) for observer in observers if getattr(type(observer), hook) is not nothing)
