"""The arrays of a server and of its workers, as compiled code takes them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from psgd.core.server.journal import RECORD
from psgd.core.server.live_worker import LiveWorker
from psgd.core.server.parameter_server import ParameterServer
from psgd.serving.compiled.push import ServerArrays, WorkerArrays
from psgd.serving.compiled.rule import RULE, epoch_grid
from psgd.serving.compiled.step import BLOCK

__all__ = ["padded_name", "server_arrays", "worker_arrays"]

NAME_SIZE = RECORD["worker"].itemsize


def server_arrays(server: ParameterServer, mutex: NDArray[np.uint8], fault: NDArray[np.int64]) -> ServerArrays:
    """Return the arrays of a server, with an empty rule: `write_rule` has to fill it.

    Args:
        server: the server.
        mutex: memory of the server's lock.
        fault: `[1]`, 1 after a call of the server has failed, else 0.
    """
    state = server.arrays()
    journal = state.journal
    # Records of a run with one server lie side by side, others do not. The second index changes nothing. With it, Numba
    # takes no such array as contiguous, and compiles the same code for all of them.
    records = np.ndarray((len(journal), 2), RECORD, journal, strides=(journal.strides[0], 0))
    scratch = np.empty(BLOCK, np.float32)
    return ServerArrays(np.zeros(1, RULE), epoch_grid(server.grid), state, records, scratch, mutex, fault)


def worker_arrays(name: str, worker: LiveWorker) -> WorkerArrays:
    """Return the arrays of a worker."""
    return WorkerArrays(padded_name(name), worker.counts, worker.times)


def padded_name(name: str) -> NDArray[np.uint8]:
    """Return the name of a worker as in a record of the journal, `[16]`, padded with zeros."""
    padded = np.zeros(NAME_SIZE, np.uint8)
    code = np.frombuffer(name.encode()[:NAME_SIZE], np.uint8)
    padded[: len(code)] = code
    return padded
