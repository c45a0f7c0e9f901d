"""psgd's server and workers as bare processes, without Ray and without a driver: what the lane and the server cost.

The workers take short leases from one counter, so that epochs follow each other as in a run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Barrier
from typing import Any

from psgd.job import OpenJob
from psgd.spec import JobSpec
from psgd_workers.messages import BatchRange, FloatArray, Lease, Version
from psgd_workers.transport.frames import PushFormat
from psgd_workers.transport.handshake import Address
from psgd_workers.transport.memory import PublishedVector
from psgd_workers.transport.shm import ShmLane
from psgd_workers.worker import Route
from tests.benchmarks.measurement import Measurement, Span, run_command_line
from tests.benchmarks.peers.psgd_job import job
from tests.benchmarks.process_group import SPAWN, process_group, take
from tests.benchmarks.setting import NUM_WORKERS

__all__ = ["measure"]

HOST = "127.0.0.1"
LEASE = 67  # batches; seven leases make an epoch of 469
TIMEOUT_S = 60.0


def measure(seconds: float) -> Measurement:
    """Measure the updates per second of all workers together."""
    spec = JobSpec.model_validate(job(seconds))
    opened = OpenJob.open(spec)
    counter = SPAWN.Value("q", 0)
    start = SPAWN.Barrier(NUM_WORKERS)
    with (
        _server(spec, opened) as (address, pipe),
        process_group(NUM_WORKERS, _work, spec, address, start, counter, seconds) as answers,
    ):
        spans = answers()
        pipe.send(None)
        weights, cpu_s, updates = pipe.recv()
    assert opened.dataset.validation is not None
    accuracy = opened.worker("judge").evaluate(weights, opened.dataset.validation).accuracy or 0.0
    assert updates == sum(span.updates for span in spans), "every push is applied"
    return Measurement.of("psgd_bare", Span.over(spans), accuracy, server_us=1e6 * cpu_s / updates)


@contextmanager
def _server(spec: JobSpec, opened: OpenJob) -> Iterator[tuple[Address, Connection]]:
    pipe, end = SPAWN.Pipe()
    process = SPAWN.Process(target=_serve, args=(end, spec, opened.weights, opened.shards.grid), daemon=True)
    process.start()
    end.close()
    try:
        yield pipe.recv(), pipe
    finally:
        process.terminate()
        process.join()


def _serve(pipe: Connection, spec: JobSpec, weights: FloatArray, grid: Any) -> None:
    # Imported here, so that the worker processes need not import the core.
    from psgd.core.server.parameter_server import ParameterServer
    from psgd.core.server.partitions import Partition
    from psgd.serving.host import ServerHost
    from psgd.serving.listener import Listener

    size = len(weights)
    published = PublishedVector(size)
    server = ParameterServer(spec, Partition(0, 0, size, size), weights, grid, Version(1, 0), published)
    host = ServerHost(server)
    host.compile()
    for rank in range(NUM_WORKERS):
        host.join(f"worker-{rank}")
    listener = Listener(host, PushFormat(size, size), size, slice(0, size), published)
    listener.listen_unix()
    pipe.send(listener.address("here", HOST))
    before = time.process_time()
    pipe.recv()
    pipe.send((server.weights, time.process_time() - before, server.version.updates))
    listener.close()


def _work(
    rank: int, spec: JobSpec, address: Address, start: Barrier, counter: Synchronized[int], seconds: float
) -> Span:
    opened = OpenJob.open(spec)
    size = len(opened.weights)
    name = f"worker-{rank}"
    whole = slice(0, size)
    push_format = PushFormat(size, size)
    route = Route(whole, lambda segment: ShmLane(name, segment, whole, push_format, address, TIMEOUT_S))
    worker = opened.worker(name, [route])
    worker.connect()
    batches = opened.shards.grid.num_batches
    assert batches % LEASE == 0
    start.wait(TIMEOUT_S)
    first = time.monotonic()
    updates = 0
    while time.monotonic() - first < seconds:
        epoch, position = divmod(take(counter) * LEASE, batches)
        worker.work(Lease(updates, (BatchRange(epoch, position, position + LEASE),)), lambda: False)
        updates += LEASE
    last = time.monotonic()
    worker.disconnect()
    return Span(updates, first, last)


if __name__ == "__main__":
    run_command_line(measure, __doc__)
