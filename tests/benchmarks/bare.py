"""A server and its workers as bare processes, without Ray, to measure the cost of lane and core alone.

The server is a job's `ParameterServer` with plain SGD, behind the host and the listener that serve real runs; a worker
pushes one constant gradient again and again, each time as a new batch.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack, suppress
from ctypes import c_bool
from itertools import count
from math import sqrt
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from psgd_workers.messages import BatchId, EpochGrid, Gradient, Outcome, Version
from psgd_workers.transport.frames import PushFormat
from psgd_workers.transport.handshake import Address
from psgd_workers.transport.lane import Lane, LaneKind
from psgd_workers.transport.memory import PublishedVector, Segment
from psgd_workers.transport.shm import ShmLane
from psgd_workers.transport.tcp import TcpLane
from tests.benchmarks.process_group import SPAWN

__all__ = ["BareServer", "BareWorker", "Mark", "Stop", "stop_flag"]

# Of all workers together, so that a snapshot copies as much for any number of them. They are more than can be pushed,
# because the end of an epoch costs a copy of the weights.
BATCHES = 8_000_000
HOST = "127.0.0.1"
LANES: dict[LaneKind, type[ShmLane | TcpLane]] = {"shm": ShmLane, "tcp": TcpLane}
TIMEOUT_S = 60.0
VALUE = 1e-6  # each value of each gradient

Stop = Any  # a shared flag with the attribute `value`; ctypes has no type for it


def stop_flag() -> Stop:
    """Return a shared flag that is False and is read without a lock."""
    return SPAWN.RawValue(c_bool, False)


class Mark(NamedTuple):
    """The progress of a server at one moment, or between two moments."""

    time_s: float  # monotonic clock of the machine
    cpu_s: float  # CPU time of its process, user and system
    applied: int  # gradients applied

    @property
    def rate(self) -> float:
        """Gradients per second."""
        return self.applied / self.time_s

    @property
    def cpu_us(self) -> float:
        """Microseconds of CPU time per gradient."""
        return 1e6 * self.cpu_s / self.applied

    def since(self, before: Mark) -> Mark:
        """Return the difference between this mark and an earlier one."""
        return Mark(self.time_s - before.time_s, self.cpu_s - before.cpu_s, self.applied - before.applied)


class BareServer:
    """A parameter server in a process of its own, while the block lasts.

    Args:
        size: values of the weights.
        workers: number of workers that may push.
        authenticates: True if frames on the network have tags.

    Attributes:
        address: address for its workers.
    """

    address: Address

    def __init__(self, size: int, workers: int, authenticates: bool = False) -> None:
        self._size = size
        self._workers = workers
        self._authenticates = authenticates
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._pipe, end = SPAWN.Pipe()
        process = SPAWN.Process(target=_serve, args=(end, self._size, self._workers, self._authenticates), daemon=True)
        process.start()
        end.close()
        self._stack.callback(process.join)
        self._stack.callback(process.terminate)
        self.address = self._pipe.recv()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def mark(self) -> Mark:
        """Return the server's progress until now."""
        self._pipe.send(None)
        mark: Mark = self._pipe.recv()
        return mark


def _serve(pipe: Connection, size: int, workers: int, authenticates: bool) -> None:
    # Imported here, so that the worker processes, up to 64, need not import the core.
    from psgd.core.server.parameter_server import ParameterServer
    from psgd.core.server.partitions import Partition
    from psgd.serving.host import ServerHost
    from psgd.serving.listener import Listener
    from tests.support.jobs import job

    published = PublishedVector(size)
    each = BATCHES // workers
    grid = EpochGrid((each,) * workers, each * workers)
    zeros = np.zeros(size, np.float32)
    server = ParameterServer(job(), Partition(0, 0, size, size), zeros, grid, Version(1, 0), published)
    host = ServerHost(server)
    host.compile()
    for rank in range(workers):
        host.join(f"worker-{rank}")
    push_format = PushFormat(size, size, authenticates=authenticates)
    listener = Listener(host, push_format, size, slice(0, size), published)
    listener.listen_unix()
    listener.listen_tcp(HOST, None)
    pipe.send(listener.address("here", HOST))
    with suppress(EOFError):  # the measuring process has ended
        while True:
            pipe.recv()
            pipe.send(Mark(time.monotonic(), time.process_time(), server.version.updates))
            asyncio.run(host.snapshot(TIMEOUT_S))  # takes the journal, as each checkpoint does
    listener.close()


class BareWorker:
    """A worker that pushes the same gradient again and again.

    Args:
        kind: kind of lane.
        rank: number of the worker, from 0.
        size: values of the weights.
        address: address of the server.
        authenticates: True if frames on the network have tags.

    Attributes:
        slot: memory of the newest weights and of the gradient.
    """

    def __init__(self, kind: LaneKind, rank: int, size: int, address: Address, authenticates: bool = False) -> None:
        self._name = f"worker-{rank}"
        segment = Segment(size, slots=1)
        try:
            push_format = PushFormat(size, size, authenticates=authenticates)
            whole = slice(0, size)
            self._lane: Lane = LANES[kind](self._name, segment, whole, push_format, address, TIMEOUT_S)
        finally:
            segment.close()
        (self.slot,) = segment.slots
        self.slot.gradient[:] = VALUE
        self._norm = VALUE * sqrt(size)
        self._batches = (BatchId(0, rank, index) for index in count())
        self._version = self._lane.pull(0, TIMEOUT_S)

    def push(self) -> None:
        """Push the gradient, and wait for the receipt and the new weights.

        Raises:
            SystemExit: the gradient was not applied.
        """
        batch = next(self._batches)
        values = self.slot.gradient
        gradient = Gradient(self._name, 0, batch.index + 1, batch, 1, self._version, values, 1.0, self._norm, 0.001)
        receipt = self._lane.push(gradient, 0, wants=True).receipt(TIMEOUT_S)
        if receipt.outcome is not Outcome.APPLIED:
            raise SystemExit(f"{self._name} pushed {batch}, which was {receipt.outcome.value} instead of applied")
        self._version = receipt.version

    def close(self) -> None:
        """Disconnect from the server."""
        self._lane.close()
