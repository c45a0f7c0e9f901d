"""The host: one `ParameterServer`, the threads that call it, and everybody who waits for something of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future
from threading import Event, Lock
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.report import Report
from psgd.core.server.state import ServerState
from psgd.errors import RunError, StateUnchangedError, StorageError
from psgd.spec import Settings
from psgd_workers.messages import BatchId, FloatArray, Gradient, Receipt, Version

__all__ = ["Reply", "ServerHost"]

REPORT_S = 0.2  # a waiting report is given after this time at the latest

# Called once, at the instant the receipt is due, when nobody else may call the server: it copies what is to go back.
# What it returns, if there is anything left to do, sends that; others may call the server meanwhile.
Reply = Callable[[Receipt], Callable[[], None] | None]


class ServerHost:
    """Calls the server serially, for any thread, and hands out what becomes due.

    A server that fails in the middle of a call may be in no state at all: nobody can call it again, so that the driver
    hears of it with its next report, and restores it elsewhere.

    Args:
        server: which nobody else calls any more.

    Raises:
        RunError: by every method, once the server has failed.
    """

    def __init__(self, server: ParameterServer) -> None:
        self.server = server
        self._lock_server = ServerLock()
        self._replies: dict[tuple[str, BatchId], list[Reply]] = {}  # of pushes that wait, oldest first
        self._epochs = server.epochs
        self._news = Event()  # an epoch is complete
        self._snapshot: Future[tuple[ServerState, NDArray[np.void]]] | None = None  # wanted between rounds

    def pull(self, into: FloatArray) -> Version:
        """Copy the published weights `[partition size]`."""
        with self._lock_server:
            np.copyto(into, self.server.published)
            return self.server.version

    def epoch_weights(self, epochs: int | None) -> FloatArray:
        """See `ParameterServer.epoch_weights`."""
        with self._lock_server:
            return self.server.epoch_weights(epochs)

    def push(self, gradient: Gradient, reply: Reply) -> None:
        """Take a gradient.

        Raises:
            PushRefusedError: the push is not one of this partition's; the state is as before.
        """
        with self._lock_server:
            self.server.check(gradient)
            receipts = self.server.push(gradient, time.monotonic())
            if receipts and not self._replies:  # the usual case: nobody waits, so the one receipt is this push's
                due = [reply(receipts[0])]
                self._tell()
            else:
                self._replies.setdefault((gradient.worker, gradient.batch), []).append(reply)
                due = self._due(receipts)
        _send(due)

    def join(self, worker: str) -> None:
        """The worker gets a lease."""
        with self._lock_server:
            due = self._due(self.server.join(worker, time.monotonic()))
        _send(due)

    def leave(self, worker: str) -> None:
        """The worker has no lease any more."""
        with self._lock_server:
            due = self._due(self.server.leave(worker, time.monotonic()))
        _send(due)

    def skip(self, batch: BatchId, examples: int) -> None:
        """Do without a batch."""
        with self._lock_server:
            due = self._due(self.server.skip(batch, examples, time.monotonic()))
        _send(due)

    def change(self, settings: Settings) -> Version:
        """Go on by other settings, from the version that is returned."""
        with self._lock_server:
            due = self._due(self.server.change(settings, time.monotonic()))
            version = self.server.version
        _send(due)
        return version

    def _due(self, receipts: tuple[Receipt, ...]) -> list[Callable[[], None] | None]:
        """Prepare the answers that are due."""
        due = []
        for receipt in receipts:
            key = (receipt.worker, receipt.batch)
            waiting = self._replies[key]
            reply = waiting.pop(0)
            if not waiting:
                del self._replies[key]
            due.append(reply(receipt))
        self._tell()
        return due

    def _tell(self) -> None:
        """Tell who waits for anything but an answer."""
        if self.server.epochs != self._epochs:
            self._epochs = self.server.epochs
            self._news.set()
        if self._snapshot is not None and self.server.can_save:
            self._snapshot.set_result((self.server.state(), self.server.journal.take()))
            self._snapshot = None

    async def report(self, wait: bool) -> Report:
        """At once, or when an epoch completes, or after a moment."""
        if wait:
            await asyncio.to_thread(self._news.wait, REPORT_S)
        with self._lock_server:
            self._news.clear()
            return self.server.report()

    async def snapshot(self, timeout_s: float) -> tuple[ServerState, NDArray[np.void]]:
        """The state between two rounds, and the journal until then.

        Raises:
            StorageError: no round closed in time.
        """
        wanted: Future[tuple[ServerState, NDArray[np.void]]] = Future()
        with self._lock_server:
            self._snapshot = wanted
            self._due(())
        try:
            # Unlike `wait_for`, this never cancels what a round that closes at this very moment is about to fill: the
            # journal that was taken for it would be lost.
            await asyncio.wait([asyncio.wrap_future(wanted)], timeout=timeout_s)
        finally:
            with self._lock_server:
                if self._snapshot is wanted:
                    self._snapshot = None
        if not wanted.done():
            raise StorageError(f"no round closed within {timeout_s} s, and half a round is no state")
        return wanted.result()


class ServerLock:
    """Whose turn it is to call the server; nobody's any more, once something broke in the middle of one."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._fault = ""

    def __enter__(self) -> None:
        self._lock.acquire()
        if self._fault:
            self._lock.release()
            raise RunError(f"this server failed in the middle of a call: {self._fault}; its log says more")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None and not isinstance(error, StateUnchangedError):
            self._fault = f"{type(error).__name__}: {error}"
        self._lock.release()


def _send(due: list[Callable[[], None] | None]) -> None:
    for send in due:
        if send is not None:
            send()
