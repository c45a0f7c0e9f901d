"""ServerObserver: is notified of every change of one server's state, at the moment of the change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from psgd.core.server.state import ServerState
from psgd_workers.messages import BatchId, Gradient

if TYPE_CHECKING:
    from psgd.core.server.parameter_server import ParameterServer

__all__ = ["ServerObserver"]


class ServerObserver:
    """An observer that ignores all notifications. Subclasses override some of them, and must not modify the server."""

    def started(self, server: ParameterServer) -> None:
        """Handle a new server with its initial weights. If it is restored, `restored` follows."""

    def pushed(self, gradient: Gradient) -> None:
        """Handle a push before the server decides whether to refuse it."""

    def collected(self, gradient: Gradient) -> None:
        """Handle a gradient that the server is about to add to the open round."""

    def skipped(self, batch: BatchId) -> None:
        """Handle a batch that the server has settled without its gradient."""

    def stepped(self, server: ParameterServer) -> None:
        """Handle a step that the server has just made."""

    def saved(self, server: ParameterServer, state: ServerState) -> None:
        """Handle a state that was copied from the server."""

    def restored(self, server: ParameterServer, state: ServerState) -> None:
        """Handle a server that was restored from this state as a new incarnation."""
