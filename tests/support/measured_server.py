"""A server that measures its own peak memory, in a process of its own.

The process reads one job from each line of its input, as JSON, and writes one line with the bytes that a server of that
job takes at most.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.partitions import Partition
from psgd.serving.host import ServerHost
from psgd.serving.malloc import return_large_blocks
from psgd.spec import JobSpec
from psgd.store.checkpoint_part import write_part
from psgd.store.storage import Storage
from psgd_workers.gradients.compression import build_compressor
from psgd_workers.messages import EpochGrid, Gradient, Receipt, Version

__all__ = ["SIZE", "WORKERS"]

SIZE = 10_000_000
WORKERS = 3
GRID = EpochGrid((8,), 8)
SAVED_AT = 3 * GRID.num_batches - 1  # pushes: two whole epochs, and the third without its last batch
# Order in which the workers push, in each epoch, for modes whose memory depends on it. This order fills both tables of
# `ringleader` as far as possible.
ORDERS = {"ringleader": "01220001"}
DEFAULT_ORDER = "012"  # the order of other modes
SAVE_S = 60.0


def status(field: str) -> int:
    """Return a field of this process's `/proc` status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def measure(spec: JobSpec, folder: str) -> int:
    """Return the most memory that a server of that job takes, in bytes, without the memory of the pushes sent to it."""
    sent = [gradient(spec, number) for number in range(WORKERS)]
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak, VmHWM
    before = status("VmRSS")
    run(spec, sent, folder)
    return status("VmHWM") - before


def run(spec: JobSpec, sent: Sequence[Gradient], folder: str) -> None:
    """Push until nearly three epochs are done, and save a checkpoint while training goes on."""
    server = ParameterServer(spec, Partition(0, 0, SIZE, SIZE), np.full(SIZE, 0.5, np.float32), GRID, Version(1, 0))
    host = ServerHost(server)
    for push in sent:
        host.join(push.worker)
    answers: list[Receipt] = []
    order = ORDERS.get(spec.consistency.mode, DEFAULT_ORDER)

    def push_one(number: int) -> None:
        epoch, position = divmod(number, GRID.num_batches)
        place = position if spec.consistency.mode in ORDERS else number
        push = sent[int(order[place % len(order)])]
        host.push(push._replace(batch=GRID.batch(epoch, position), read=server.version), answers.append)

    pushed = 0
    while pushed < SAVED_AT or not server.can_save:
        push_one(pushed)
        pushed += 1
    weights = host.epoch_weights(None)  # of a complete epoch, kept for its evaluation
    state, journal = asyncio.run(host.snapshot(SAVE_S))
    if server._aggregator.keeps:  # fill the next round nearly, so that it is in memory while the state is written
        for number in range(pushed, pushed + WORKERS - 1):
            push_one(number)
    write_part(Storage(folder), "000001-1", state, journal)
    assert len(weights) == SIZE
    assert len(answers) >= pushed


def gradient(spec: JobSpec, number: int) -> Gradient:
    """Return a push of one worker; its arrays are not shared with others."""
    plain = np.full(SIZE, 1e-3 * (number + 1), np.float32)
    compressor = build_compressor(spec.compression)
    read = np.full(SIZE, 0.5, np.float32) if spec.correction.reads_weights else None
    return Gradient(
        f"worker-{number}",
        slot=0,
        number=1,
        batch=GRID.batch(0, 0),
        examples=1,
        read=Version(1, 0),
        values=compressor.encode(plain) if compressor else plain,
        loss=1.0,
        norm=10.0,
        compute_s=0.01,
        weights_read=read,
    )


def main() -> None:
    return_large_blocks()
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as folder:
            print(measure(JobSpec.model_validate_json(line), folder), flush=True)


if __name__ == "__main__":
    main()
