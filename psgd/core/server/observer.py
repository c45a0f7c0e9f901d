"""ServerObserver: is told what happens to one server's state, at the moment it happens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from psgd.core.server.state import ServerState
from psgd_workers.messages import BatchId, Gradient

if TYPE_CHECKING:
    from psgd.core.server.parameter_server import ParameterServer

__all__ = ["ServerObserver"]


class ServerObserver:
    """Looks and changes nothing. This one ignores everything; subclasses pick what they need."""

    def started(self, server: ParameterServer) -> None:
        """The server is there, with its first weights; if it is restored, `restored` follows."""

    def pushed(self, gradient: Gradient) -> None:
        """A push came. It may be refused."""

    def collected(self, gradient: Gradient) -> None:
        """A gradient is about to go into the open round."""

    def skipped(self, batch: BatchId) -> None:
        """The partition does without this batch from now on."""

    def stepped(self, server: ParameterServer) -> None:
        """A step was made."""

    def saved(self, server: ParameterServer, state: ServerState) -> None:
        """The state was copied."""

    def restored(self, server: ParameterServer, state: ServerState) -> None:
        """The server is made of this state, as a new incarnation."""
