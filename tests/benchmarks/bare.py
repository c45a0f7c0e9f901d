"""A server and its workers as bare processes, without Ray: what lane and core cost by themselves.

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

BATCHES = 1_000_000  # of each worker: more than it can push, as an epoch's end would cost a copy of the weights
HOST = "127.0.0.1"
LANES: dict[LaneKind, type[ShmLane | TcpLane]] = {"shm": ShmLane, "tcp": TcpLane}
TIMEOUT_S = 60.0
VALUE = 1e-6  # of each gradient's values

Stop = Any  # a shared flag, `value` its state; ctypes has no type for it


def stop_flag() -> Stop:
    """One that costs its readers nothing, and is false."""
    return SPAWN.RawValue(c_bool, False)


class Mark(NamedTuple):
    """How far a server has come; a difference of two marks says what it did between them."""

    time_s: float  # of the machine's clock
    cpu_s: float  # that its process has computed for, user and system: utime + stime of /proc, to the nanosecond
    applied: int  # gradients

    @property
    def rate(self) -> float:
        """Gradients per second."""
        return self.applied / self.time_s

    @property
    def cpu_us(self) -> float:
        """Microseconds of computing per gradient."""
        return 1e6 * self.cpu_s / self.applied

    def since(self, before: Mark) -> Mark:
        """Return what the server did since `before`."""
        return Mark(self.time_s - before.time_s, self.cpu_s - before.cpu_s, self.applied - before.applied)


class BareServer:
    """A parameter server in a process of its own, while the block lasts.

    Args:
        size: values of the weights.
        workers: how many may push.

    Attributes:
        address: for its workers.
    """

    address: Address

    def __init__(self, size: int, workers: int) -> None:
        self._size = size
        self._workers = workers
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._pipe, end = SPAWN.Pipe()
        process = SPAWN.Process(target=_serve, args=(end, self._size, self._workers), daemon=True)
        process.start()
        end.close()
        self._stack.callback(process.join)
        self._stack.callback(process.terminate)
        self.address = self._pipe.recv()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def mark(self) -> Mark:
        """How far it has come now."""
        self._pipe.send(None)
        mark: Mark = self._pipe.recv()
        return mark


def _serve(pipe: Connection, size: int, workers: int) -> None:
    # Here, so that 64 worker processes need not import the core.
    from psgd.core.server.parameter_server import ParameterServer
    from psgd.core.server.partitions import Partition
    from psgd.serving.host import ServerHost
    from psgd.serving.listener import Listener
    from tests.support.jobs import job

    published = PublishedVector(size)
    grid = EpochGrid((BATCHES,) * workers, BATCHES * workers)
    zeros = np.zeros(size, np.float32)
    server = ParameterServer(job(), Partition(0, 0, size, size), zeros, grid, Version(1, 0), published)
    host = ServerHost(server)
    listener = Listener(host, PushFormat(size, size), size, slice(0, size), published)
    listener.listen_unix()
    listener.listen_tcp(HOST, None)
    pipe.send(listener.address("here", HOST))
    with suppress(EOFError):  # whoever measures is gone
        while True:
            pipe.recv()
            pipe.send(Mark(time.monotonic(), time.process_time(), server.version.updates))
            asyncio.run(host.snapshot(TIMEOUT_S))  # takes the journal, as each checkpoint does
    listener.close()


class BareWorker:
    """One worker's lane, and what it pushes.

    Args:
        kind: of the lane.
        rank: of the worker, from 0.
        size: values of the weights.
        address: of the server.

    Attributes:
        slot: the weights that came last, and the gradient.
    """

    def __init__(self, kind: LaneKind, rank: int, size: int, address: Address) -> None:
        self._name = f"worker-{rank}"
        segment = Segment(size, slots=1)
        try:
            push_format = PushFormat(size, size)
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
        """Push the gradient, and wait for receipt and weights.

        Raises:
            SystemExit: it was not applied.
        """
        batch = next(self._batches)
        values = self.slot.gradient
        gradient = Gradient(self._name, 0, batch.index + 1, batch, 1, self._version, values, 1.0, self._norm, 0.001)
        receipt = self._lane.push(gradient, 0, wants=True).receipt(TIMEOUT_S)
        if receipt.outcome is not Outcome.APPLIED:
            raise SystemExit(f"{self._name} pushed {batch}, which was {receipt.outcome.value}")
        self._version = receipt.version

    def close(self) -> None:
        """Let go of the server."""
        self._lane.close()
