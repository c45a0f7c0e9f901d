"""The lock of a server, which threads in Python and in compiled code share."""

from __future__ import annotations

import ctypes
from types import TracebackType
from typing import Any

import numpy as np

from psgd.errors import RunError, StateUnchangedError

__all__ = ["ServerLock"]

SIZE = 64  # bytes; a pthread_mutex_t is 40 to 64 bytes long
without_interpreter: Any = ctypes.CDLL(None)  # other threads run Python meanwhile
with_interpreter: Any = ctypes.PyDLL(None)  # no other thread runs Python meanwhile, so a call must not wait


class ServerLock:
    """A POSIX mutex around each call of a server. It cannot be taken in Python any more after a call has failed.

    A call that raises `StateUnchangedError` has not failed in this sense.

    Attributes:
        mutex: `[64]`, uint8: memory of the mutex.
        fault: `[1]`, int64: 1 after a call has failed. Compiled code takes the mutex itself, and looks at this.

    Raises:
        RunError: on entering, after a call has failed.
    """

    def __init__(self) -> None:
        self.mutex = np.zeros(SIZE, np.uint8)
        self.fault = np.zeros(1, np.int64)
        self._address = ctypes.c_void_p(self.mutex.ctypes.data)
        self._message = ""
        without_interpreter.pthread_mutex_init(self._address, None)

    def __enter__(self) -> None:
        # To let other threads run Python takes longer than most waits; so that is done only if there is a wait.
        if with_interpreter.pthread_mutex_trylock(self._address):
            without_interpreter.pthread_mutex_lock(self._address)
        if self._message:
            with_interpreter.pthread_mutex_unlock(self._address)
            raise RunError(f"this server failed in the middle of a call: {self._message}; its log has the details")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None and not isinstance(error, StateUnchangedError):
            self._message = f"{type(error).__name__}: {error}"
            self.fault[0] = 1
        with_interpreter.pthread_mutex_unlock(self._address)
