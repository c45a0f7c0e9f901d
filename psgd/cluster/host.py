"""The host: one `ParameterServer` on an event loop, and everybody who waits for something of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from psgd.core.report import Report
from psgd.core.server import ParameterServer, ServerState
from psgd.errors import StorageError
from psgd.spec import Settings
from psgd_workers.messages import BatchId, Gradient, Receipt

__all__ = ["Reply", "ServerHost"]

REPORT_S = 0.2  # a waiting report is given after this time at the latest

Reply = Callable[[Receipt], None]  # called once, at the instant the receipt is due


class ServerHost:
    """Calls the server serially, and hands out what becomes due.

    Args:
        server: which nobody else calls any more.
    """

    def __init__(self, server: ParameterServer) -> None:
        self.server = server
        self._replies: dict[tuple[str, BatchId], list[Reply]] = {}  # of pushes that wait, oldest first
        self._epochs = server.epochs
        self._news = asyncio.Event()  # an epoch is complete
        self._snapshot: asyncio.Future[tuple[ServerState, NDArray[np.void]]] | None = None  # wanted between rounds

    def push(self, gradient: Gradient, reply: Reply) -> None:
        """Take a gradient; what is sent with the receipt must be copied when `reply` is called.

        Raises:
            LaneError: it is none of this partition's.
        """
        self.server.check(gradient)
        receipts = self.server.push(gradient, time.monotonic())
        self._replies.setdefault((gradient.worker, gradient.batch), []).append(reply)
        self._deliver(receipts)

    def join(self, worker: str) -> None:
        """The worker gets a lease."""
        self._deliver(self.server.join(worker, time.monotonic()))

    def leave(self, worker: str) -> None:
        """The worker has no lease any more."""
        self._deliver(self.server.leave(worker, time.monotonic()))

    def skip(self, batch: BatchId, examples: int) -> None:
        """Do without a batch."""
        self._deliver(self.server.skip(batch, examples, time.monotonic()))

    def change(self, settings: Settings) -> None:
        """Go on by other settings."""
        self._deliver(self.server.change(settings, time.monotonic()))

    def _deliver(self, receipts: tuple[Receipt, ...]) -> None:
        for receipt in receipts:
            key = (receipt.worker, receipt.batch)
            waiting = self._replies[key]
            reply = waiting.pop(0)
            if not waiting:
                del self._replies[key]
            reply(receipt)
        if self.server.epochs != self._epochs:
            self._epochs = self.server.epochs
            self._news.set()
        if self._snapshot is not None and self.server.can_save:
            self._snapshot.set_result((self.server.state(), self.server.journal.take()))
            self._snapshot = None

    async def report(self, wait: bool) -> Report:
        """At once, or when an epoch completes, or after a moment."""
        if wait:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), REPORT_S)
        self._news.clear()
        return self.server.report()

    async def snapshot(self, timeout_s: float) -> tuple[ServerState, NDArray[np.void]]:
        """The state between two rounds, and the journal until then.

        Raises:
            StorageError: no round closed in time.
        """
        wanted: asyncio.Future[tuple[ServerState, NDArray[np.void]]] = asyncio.get_running_loop().create_future()
        self._snapshot = wanted
        self._deliver(())
        try:
            # Unlike `wait_for`, this never cancels what a round that closes at this very moment is about to fill: the
            # journal that was taken for it would be lost.
            await asyncio.wait([wanted], timeout=timeout_s)
        finally:
            if self._snapshot is wanted:
                self._snapshot = None
        if not wanted.done():
            raise StorageError(f"no round closed within {timeout_s} s, and half a round is no state")
        return wanted.result()
