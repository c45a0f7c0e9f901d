"""Interruption: SIGINT, SIGTERM and SIGHUP, which end what is under way in good order.

No handler raises an exception. Python runs handlers between any two instructions of the main thread, and an exception
that is raised inside a fork handler, a destructor or a callback is dropped, perhaps with a lock still taken (CPython
issue 106238). So the work runs in a thread of its own, in which no handler ever runs, and the main thread does nothing
but wait for signals and for the work's end. The work looks at its `Interruption` at safe points.

Ray installs a handler for SIGTERM that exits at once, but only if it is started in the main thread.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from contextvars import copy_context
from queue import Empty, SimpleQueue
from types import FrameType
from typing import TypeVar

__all__ = ["Abandoned", "Interruption", "run_interruptibly"]

WAKE_S = 0.1
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

T = TypeVar("T")


class Abandoned(KeyboardInterrupt):
    """A signal came, and the work was left where it was."""


class Interruption:
    """A request to end, as the work sees it.

    Attributes:
        requested: True once a signal has come.
        outlook: what becomes of the work if a signal comes now, for people; empty: there is nothing to tell.
    """

    def __init__(self) -> None:
        self.requested = False
        self.outlook = ""
        self._lock = threading.Lock()
        self._critical = 0  # sections that the work is in
        self._seen: set[int] = set()

    def check(self) -> None:
        """End the work here, if it is to end.

        Raises:
            KeyboardInterrupt: a signal has come.
        """
        if self.requested:
            raise KeyboardInterrupt(self.message)

    @property
    def message(self) -> str:
        """What a signal is answered with."""
        return f"interrupted: {self.outlook}" if self.outlook else "interrupted"

    @contextmanager
    def critical(self, outlook: str) -> Iterator[None]:
        """Mark a section that leaves something behind if it is cut short: a signal waits for its end.

        The section should look at `requested` or `check` from time to time, and tidy up. Sections may be nested.

        Args:
            outlook: as the attribute, from now on.

        Raises:
            KeyboardInterrupt: a signal came before the outermost section began.
        """
        with self._lock:
            if not self._critical:
                self.check()
            self._critical += 1
            self.outlook = outlook
        try:
            yield
        finally:
            with self._lock:
                self._critical -= 1

    def request(self, number: int) -> bool:
        """Note a signal.

        Args:
            number: the signal.

        Returns:
            True if the work is to be waited for: it is in a critical section, and this signal comes for the first time.
        """
        with self._lock:
            again = number in self._seen
            self._seen.add(number)
            self.requested = True
            return self._critical > 0 and not again


def run_interruptibly(work: Callable[[], T], interruption: Interruption) -> T:
    """Run `work` in a thread, and wait for it and for signals. Each signal is answered by a line on stderr.

    Called from another thread than the main one, where no signals arrive, it runs `work` there.

    Args:
        work: what to do.
        interruption: what `work` looks at to find out that it is to end.

    Returns:
        What `work` returns.

    Raises:
        Abandoned: a signal came, and the work was left where it was. It ends by itself at its next `check`.
        BaseException: what `work` raised.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    inbox: SimpleQueue[int | None] = SimpleQueue()  # signals; None: the work has ended
    outcome: Future[T] = Future()
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
    thread = threading.Thread(target=copy_context().run, args=(_run, work, outcome, inbox), name="psgd", daemon=True)
    with _handlers(inbox.put) as install:
        thread.start()
        while (number := _next(inbox, install)) is not None:
            if number == signal.SIGHUP:
                _let_go(terminals)
            message = interruption.message
            waits = interruption.request(number)
            _tell(message, waits)
            if not waits:
                raise Abandoned(message)
    return outcome.result()


def _next(inbox: SimpleQueue[int | None], install: Callable[[], None]) -> int | None:
    """Wait for a signal, or for None.

    Python runs a handler when the main thread executes its next instruction. A signal that comes just before the thread
    begins to wait does not wake it, so it wakes by itself. Then it installs the handlers anew, because a library may
    have put its own in their place beneath Python: Ray's core does, and its handler aborts the process 3 s later.
    """
    while True:
        try:
            return inbox.get(timeout=WAKE_S)
        except Empty:
            install()


def _tell(message: str, waits: bool) -> None:
    again = ". The same signal again ends it at once" if waits else ""
    with suppress(OSError):  # there is nobody to read it any more
        sys.stderr.write(f"psgd: {message}{again}\n")  # in one piece: the work may write at the same moment
        sys.stderr.flush()


def _let_go(terminals: list[int]) -> None:
    """Write to nowhere instead of terminals that were closed, so that what is printed from now on raises nothing."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for terminal in terminals:
        os.dup2(nowhere, terminal)
    os.close(nowhere)


def _run(work: Callable[[], T], outcome: Future[T], inbox: SimpleQueue[int | None]) -> None:
    try:
        outcome.set_result(work())
    except BaseException as error:  # noqa: BLE001 - it is raised where it is waited for
        outcome.set_exception(error)
    finally:
        inbox.put(None)


@contextmanager
def _handlers(put: Callable[[int], None]) -> Iterator[Callable[[], None]]:
    """Pass signals on, those left out that were ignored before (as `nohup` does).

    Yields:
        A function that installs the handlers anew.
    """
    process = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        if os.getpid() == process:
            put(number)
        else:  # a copy of this process that the work forked: it has no thread that would look
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def install() -> None:
        for number in before:
            signal.signal(number, handle)

    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}
    install()
    try:
        yield install
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was none of Python's
