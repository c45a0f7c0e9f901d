"""Interruption by SIGINT, SIGTERM or SIGHUP: a command ends at its next safe point.

No handler raises an exception. Python runs handlers between any two instructions of the main thread, and an exception
that is raised inside a fork handler, a destructor or a callback is dropped, perhaps with a lock still taken (CPython
issue 106238). Therefore the work runs in its own thread, in which Python never runs a handler, and the main thread only
waits for signals and for the end of the work. The work checks its `Interruption` at safe points.

Running the work in another thread also keeps Ray from installing its own handler for SIGTERM, which exits at once: Ray
does that only if it is started in the main thread.
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

WAKE_S = 0.1  # seconds between two checks that the signal handlers are still installed
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

T = TypeVar("T")


class Abandoned(KeyboardInterrupt):
    """A signal arrived, and the main thread did not wait for the end of the work."""


class Interruption:
    """A request to end the work, which the work checks at safe points.

    Attributes:
        requested: True once a signal has arrived.
        outlook: clause for the user that says what happens to the work if a signal arrives now, such as "the run is
            saved"; empty if there is nothing to say.
    """

    def __init__(self) -> None:
        self.requested = False
        self.outlook = ""
        self._lock = threading.Lock()
        self._critical = 0  # number of nested critical sections that the work is in
        self._seen: set[int] = set()

    def check(self) -> None:
        """End the work here if a signal has arrived.

        Raises:
            KeyboardInterrupt: a signal has arrived.
        """
        if self.requested:
            raise KeyboardInterrupt(self.message)

    @property
    def message(self) -> str:
        """Message that answers a signal."""
        return f"interrupted: {self.outlook}" if self.outlook else "interrupted"

    @contextmanager
    def critical(self, outlook: str) -> Iterator[None]:
        """Mark a section that must run to its end: if it were cut off, it would leave files or processes behind.

        After a first signal, the main thread waits for the end of the section. The section should check `requested`
        from time to time, and then clean up and end. Sections may be nested.

        Args:
            outlook: new value of the attribute `outlook`.

        Raises:
            KeyboardInterrupt: a signal arrived before the outermost section began.
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
        """Record that a signal arrived.

        Args:
            number: number of the signal.

        Returns:
            True if the main thread must wait for the work: the work is in a critical section, and this signal has not
            arrived before.
        """
        with self._lock:
            again = number in self._seen
            self._seen.add(number)
            self.requested = True
            return self._critical > 0 and not again


def run_interruptibly(work: Callable[[], T], interruption: Interruption) -> T:
    """Run `work` in a thread, and wait for its end and for signals. Each signal is answered by a line on stderr.

    If this is not called in the main thread, which alone gets signals, it calls `work` directly.

    Args:
        work: function to run.
        interruption: request to end, which `work` checks.

    Returns:
        The value that `work` returns.

    Raises:
        Abandoned: a signal arrived while the work was in no critical section, or arrived twice. The thread of the work
            ends at its next `check`.
        BaseException: any exception of `work`.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    inbox: SimpleQueue[int | None] = SimpleQueue()  # numbers of signals; None: the work has ended
    outcome: Future[T] = Future()
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
    thread = threading.Thread(target=copy_context().run, args=(_run, work, outcome, inbox), name="psgd", daemon=True)
    with _handlers(inbox.put) as install:
        thread.start()
        while (number := _next_signal(inbox, install)) is not None:
            if number == signal.SIGHUP:
                _redirect_to_devnull(terminals)
            message = interruption.message
            waits = interruption.request(number)
            _print_answer(message, waits)
            if not waits:
                raise Abandoned(message)
    return outcome.result()


def _next_signal(inbox: SimpleQueue[int | None], install: Callable[[], None]) -> int | None:
    """Wait for a signal, or for None, which says that the work has ended.

    Python runs a handler when the main thread executes its next instruction. A signal that arrives just before the
    thread begins to wait does not wake it, so the wait has a timeout. After each timeout the handlers are installed
    again, because a library may have replaced them without Python's knowledge: Ray's core does, and its handler aborts
    the process 3 s later.
    """
    while True:
        try:
            return inbox.get(timeout=WAKE_S)
        except Empty:
            install()


def _print_answer(message: str, waits: bool) -> None:
    again = ". The same signal again ends psgd at once" if waits else ""
    with suppress(OSError):  # stderr is closed
        sys.stderr.write(f"psgd: {message}{again}\n")  # in one call: the work may write at the same time
        sys.stderr.flush()


def _redirect_to_devnull(terminals: list[int]) -> None:
    """Replace terminals that were closed by the null device, so that printing raises no error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for terminal in terminals:
        os.dup2(nowhere, terminal)
    os.close(nowhere)


def _run(work: Callable[[], T], outcome: Future[T], inbox: SimpleQueue[int | None]) -> None:
    try:
        outcome.set_result(work())
    except BaseException as error:  # noqa: BLE001 - raised again by run_interruptibly
        outcome.set_exception(error)
    finally:
        inbox.put(None)


@contextmanager
def _handlers(put: Callable[[int], None]) -> Iterator[Callable[[], None]]:
    """Pass signals to `put`, except for signals that were ignored before (as `nohup` does).

    Yields:
        A function that installs the handlers again.
    """
    process = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        if os.getpid() == process:
            put(number)
        else:  # in a process that the work forked: it has no thread that reads the inbox
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
            signal.signal(number, handler or signal.SIG_DFL)  # None: the handler was not installed by Python
