"""The way of pushes into a simulated server: the reference, and compiled code in long simulations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from psgd.core.server.parameter_server import ParameterServer
from psgd.serving.compiled.loading import load_direct_path
from psgd_workers.messages import BatchId, Gradient, Receipt

if TYPE_CHECKING:
    from psgd.serving.compiled.direct import DirectPath

__all__ = ["COMPILE_AFTER", "PushPath"]

# Pushes to a server before compiled code is loaded: by then, it would have saved the 0.5 s that loading takes. Where it
# is not kept on disk yet, it is compiled once, which takes about 12 s.
COMPILE_AFTER = 30_000


class PushPath:
    """The way of pushes into one server.

    Args:
        server: the server.

    Attributes:
        lanes: number of the worker's lane for each push without a receipt, oldest first, by worker and batch.
    """

    def __init__(self, server: ParameterServer) -> None:
        self._server = server
        self.lanes: dict[tuple[str, BatchId], list[int]] = {}
        self._pushes = 0  # pushes that the server itself took
        self._direct: DirectPath | None = None
        self._loads = False  # True once compiled code was loaded, or could not be

    def push(self, gradient: Gradient, now: float) -> tuple[Receipt, ...]:
        """Let the server check and take a push. Return every receipt that is due now.

        Raises:
            PushRefusedError: the server refuses the push. Its state is as before.
        """
        if self._direct is not None and (receipt := self._direct.push(gradient, now)) is not None:
            return (receipt,)
        server = self._server
        server.check(gradient)
        receipts = server.push(gradient, now)
        self._pushes += 1
        if self._pushes >= COMPILE_AFTER and not self._loads and server.steps_alone:
            self._loads = True
            self._direct = load_direct_path(server)
        return receipts

    def refresh(self) -> None:
        """Notice that the server's settings have changed."""
        if self._direct is not None:
            self._direct.refresh()
