"""Compiled code for pushes that come from the server's own process, as Python objects and not as frames.

A call of compiled code takes 7 µs if it is given all arrays of a server, because it looks at each of them. So a list
keeps them between the calls, and a push brings only its numbers, its values and its worker's arrays.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import chain
from struct import Struct
from typing import Any, NamedTuple

import numpy as np
from numba.typed import List
from numpy.typing import NDArray

from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.push_arrays import INCARNATION, UPDATES
from psgd.serving.compiled.arrays import padded_name, server_arrays
from psgd.serving.compiled.native import compiled
from psgd.serving.compiled.push import ServerArrays, WorkerArrays, apply_push
from psgd.serving.compiled.rule import write_rule
from psgd.serving.server_lock import ServerLock
from psgd_workers.messages import Encoded, FloatArray, Gradient, Outcome, Receipt, Version

__all__ = ["DirectPath"]

APPLIED = Outcome.APPLIED  # bound once: in Python 3.11, access through the enum takes 80 ns
FLOAT32 = np.dtype(np.float32)
MOST_SLOTS = 1 << 8  # the journal has 8 bits for a slot
MOST_PUSHES = 1 << 63  # compiled code counts in 64 bits with a sign
MAX_NAMES = 4096  # workers whose names are kept as arrays

name_array = lru_cache(MAX_NAMES)(padded_name)


class PushNumbers(NamedTuple):
    """The fields of a frame's header that a push needs; see `Gradient`."""

    slot: int
    number: int
    carries: int
    epoch: int
    shard: int
    index: int  # type: ignore[assignment]  # hides tuple.index
    examples: int
    read_incarnation: int
    read_updates: int
    loss: float
    norm: float
    compute_s: float


class DirectArrays(NamedTuple):
    """The arrays that are the same in all pushes to a server."""

    server: ServerArrays
    others: NDArray[np.uint8]  # versions of the other partitions that the push was computed from, as in a frame
    no_weights: FloatArray  # [0]


@compiled
def keep(arrays: DirectArrays) -> Any:
    """Return a list that keeps the arrays for compiled code."""
    kept = List()
    kept.append(arrays)
    return kept


@compiled
def push_kept(
    kept: Any,
    name: NDArray[np.uint8],
    counts: NDArray[np.int64],
    times: NDArray[np.float64],
    values: FloatArray,
    now: float,
    slot: int,
    number: int,
    carries: int,
    epoch: int,
    shard: int,
    index: int,
    examples: int,
    read_incarnation: int,
    read_updates: int,
    loss: float,
    norm: float,
    compute_s: float,
) -> int:
    """Apply a push of the usual case. Return the number of updates after it; 0 if nothing was changed."""
    arrays = kept[0]
    numbers = PushNumbers(
        slot, number, carries, epoch, shard, index, examples, read_incarnation, read_updates, loss, norm, compute_s
    )
    worker = WorkerArrays(name, counts, times)
    if apply_push(arrays.server, worker, numbers, values, arrays.others, now, arrays.no_weights):
        return arrays.server.state.version[UPDATES]
    return 0


class DirectPath:
    """The compiled push path of one server to which the workers of its own process push.

    Args:
        server: the server. Only one thread calls it.
    """

    def __init__(self, server: ParameterServer) -> None:
        lock = ServerLock()
        arrays = server_arrays(server, lock.mutex, lock.fault)
        self._server = server
        self._rule = arrays.rule
        self._shape = arrays.state.weights.shape
        self._incarnation = int(arrays.state.version[INCARNATION])
        self._num_others = server.spec.scaling.servers - 1
        self._versions = Struct("<" + "IQ" * self._num_others)
        self._others = np.zeros(self._versions.size, np.uint8)
        self._kept = keep(DirectArrays(arrays, self._others, np.empty(0, np.float32)))
        self.refresh()

    def refresh(self) -> None:
        """Read the server's settings again."""
        write_rule(self._rule, self._server)

    def push(self, gradient: Gradient, now: float) -> Receipt | None:
        """Apply a push of the usual case, with its checks.

        Args:
            gradient: the push.
            now: time of the server's clock, seconds.

        Returns:
            The receipt; None if nothing was changed: then `ParameterServer` has to check and take the push.
        """
        worker = self._server.live_worker(gradient.worker)
        name, slot, number, batch, examples, read, values, loss, norm, compute_s, _, _, others, carries = gradient
        if worker is None or isinstance(values, Encoded) or values.dtype is not FLOAT32 or values.shape != self._shape:
            return None
        if len(others) != self._num_others or not (slot < MOST_SLOTS and number < MOST_PUSHES):
            return None
        if others:
            self._versions.pack_into(self._others.data, 0, *chain.from_iterable(others))
        updates = push_kept(
            self._kept,
            name_array(name),
            worker.counts,
            worker.times,
            values,
            now,
            slot,
            number,
            carries,
            *batch,
            examples,
            *read,
            loss,
            norm,
            compute_s,
        )
        return Receipt(name, batch, APPLIED, Version(self._incarnation, updates)) if updates else None
