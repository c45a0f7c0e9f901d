"""The host of one `ParameterServer`: it makes the server's calls serial and passes on receipts, reports and states."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from threading import Event
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.report import Report
from psgd.core.server.state import ServerState
from psgd.errors import StorageError
from psgd.serving.compiled.loading import load_path
from psgd.serving.server_lock import ServerLock
from psgd.spec import Settings
from psgd_workers.messages import BatchId, FloatArray, Gradient, Receipt, Version

if TYPE_CHECKING:
    from psgd.serving.compiled.path import CompiledPath

__all__ = ["Reply", "ServerHost"]

REPORT_S = 0.2  # seconds after which a waiting report is returned at the latest

# Called once, as soon as the receipt is due, while no other thread can call the server: it copies the weights that the
# answer needs. It may return a function that sends the answer; the host calls that when other threads can go on.
Reply = Callable[[Receipt], Callable[[], None] | None]


class ServerHost:
    """Lets any thread call a server, one at a time, and passes on what becomes due.

    The state of a server that fails in the middle of a call may be half changed. So every later method raises
    `RunError`; the driver notices that when it asks for the next report, and restores the server in a new process.

    Args:
        server: the server. From now on only this host may call it.

    Attributes:
        server: the server.
        compiled: compiled push path of the server; None: it is not loaded.

    Raises:
        RunError: in every method, after the server has failed.
    """

    def __init__(self, server: ParameterServer) -> None:
        self.server = server
        self.compiled: CompiledPath | None = None
        self._server_lock = ServerLock()
        self._earlier_pushes = server.report().num_pushes  # to earlier servers of the partition
        self._python_pushes = 0  # that compiled code did not take
        self._replies: dict[tuple[str, BatchId], list[Reply]] = {}  # of pushes without a receipt, oldest first
        self._epochs = server.epochs  # complete epochs at the last `_notify`
        self._epoch_ended = Event()  # an epoch has ended since the last report
        self._snapshot: Future[tuple[ServerState, NDArray[np.void]]] | None = None  # to be filled between two rounds

    def compile(self) -> None:
        """Load the compiled push path. Connections use it from their next frame on; see `load_path`."""
        path = load_path(self.server, self._server_lock)
        with self._server_lock:  # the settings may have changed meanwhile
            if path is not None:
                path.refresh()
            self.compiled = path

    def pull(self, into: FloatArray) -> Version:
        """Copy the published weights.

        Args:
            into: vector `[partition size]` that is overwritten.

        Returns:
            The version of the weights.
        """
        with self._server_lock:
            np.copyto(into, self.server.published)
            return self.server.version

    def epoch_weights(self, epochs: int | None) -> FloatArray:
        """Return the weights at the end of an epoch; see `ParameterServer.epoch_weights`."""
        with self._server_lock:
            return self.server.epoch_weights(epochs)

    def push(self, gradient: Gradient, reply: Reply) -> None:
        """Push a gradient.

        Args:
            gradient: the push. The server may read its vectors until the receipt.
            reply: called with the receipt, at once or in a later call.

        Raises:
            PushRefusedError: the push does not fit this partition. The state is unchanged, and `reply` is not called.
        """
        with self._server_lock:
            self.server.check(gradient)
            receipts = self.server.push(gradient, time.monotonic())
            self._python_pushes += 1
            if receipts and not self._replies:  # the usual case: no push waits, so the one receipt is for this push
                due = [reply(receipts[0])]
                self._notify()
            else:
                self._replies.setdefault((gradient.worker, gradient.batch), []).append(reply)
                due = self._prepare_answers(receipts)
        _send(due)

    def join(self, worker: str) -> None:
        """Announce that the worker gets a lease."""
        with self._server_lock:
            due = self._prepare_answers(self.server.join(worker, time.monotonic()))
        _send(due)

    def leave(self, worker: str) -> None:
        """Announce that the worker has no lease any more."""
        with self._server_lock:
            due = self._prepare_answers(self.server.leave(worker, time.monotonic()))
        _send(due)

    def skip(self, batch: BatchId) -> None:
        """Skip a batch: it counts as done without a gradient."""
        with self._server_lock:
            due = self._prepare_answers(self.server.skip(batch, time.monotonic()))
        _send(due)

    def change(self, settings: Settings) -> Version:
        """Change the settings of a running job. Return the version from which the new settings apply."""
        with self._server_lock:
            due = self._prepare_answers(self.server.change(settings, time.monotonic()))
            version = self.server.version
            if self.compiled is not None:
                self.compiled.refresh()
        _send(due)
        return version

    def _prepare_answers(self, receipts: tuple[Receipt, ...]) -> list[Callable[[], None] | None]:
        """Prepare the answers that are due, and return the functions that send them."""
        due = []
        for receipt in receipts:
            key = (receipt.worker, receipt.batch)
            waiting = self._replies[key]
            reply = waiting.pop(0)
            if not waiting:
                del self._replies[key]
            due.append(reply(receipt))
        self._notify()
        return due

    def _notify(self) -> None:
        """Notify the waiting report if an epoch has ended, and fill the wanted snapshot if no round is open."""
        if self.server.epochs != self._epochs:
            self._epochs = self.server.epochs
            self._epoch_ended.set()
        if self._snapshot is not None and self.server.can_save:
            self._snapshot.set_result((self.server.state(), self.server.journal.take()))
            self._snapshot = None

    async def report(self, wait: bool) -> Report:
        """Return the server's report.

        Args:
            wait: True to wait until an epoch ends, at most `REPORT_S` seconds.
        """
        if wait:
            await asyncio.to_thread(self._epoch_ended.wait, REPORT_S)
        with self._server_lock:
            self._epoch_ended.clear()
            report = self.server.report()
            pushes = report.num_pushes - self._earlier_pushes
            return replace(report, compiled=1 - self._python_pushes / pushes if pushes else None)

    async def snapshot(self, timeout_s: float) -> tuple[ServerState, NDArray[np.void]]:
        """Return the server's state between two rounds, and its journal up to this state.

        Args:
            timeout_s: longest wait until a round closes, in seconds.

        Raises:
            StorageError: no round closed in time.
        """
        wanted: Future[tuple[ServerState, NDArray[np.void]]] = Future()
        with self._server_lock:
            self._snapshot = wanted
            self._prepare_answers(())
        try:
            # Unlike `wait_for`, this never cancels the future: a round that closes at the time limit may be about to
            # fill it, and the journal that was taken for it would be lost.
            await asyncio.wait([asyncio.wrap_future(wanted)], timeout=timeout_s)
        finally:
            with self._server_lock:
                if self._snapshot is wanted:
                    self._snapshot = None
        if not wanted.done():
            raise StorageError(
                f"no round closed within {timeout_s} s, and the state within a round cannot be saved: raise "
                "failure.timeout_s, or find the worker that keeps the round open"
            )
        return wanted.result()


def _send(due: list[Callable[[], None] | None]) -> None:
    for send in due:
        if send is not None:
            send()
