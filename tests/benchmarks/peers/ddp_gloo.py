"""PyTorch DistributedDataParallel on gloo: processes in lock-step.

A step makes one change of the weights out of one gradient of each process. What is compared with the others is
*gradients* per second, the data worked through; steps per second are in the details. Each batch is taken from a shared
counter, as with the others: no process has a share of its own that it could be late with.

References:
    Li et al. (2020), "PyTorch Distributed: Experiences on Accelerating Data Parallel Training".
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from ctypes import c_int64
from datetime import timedelta
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Barrier
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from tests.benchmarks.measurement import Measurement, Span, measured_for, repeat
from tests.benchmarks.mnist import Batches, Mnist
from tests.benchmarks.network import accuracy, backpropagate, network
from tests.benchmarks.process_group import SPAWN, run_process_group, take
from tests.benchmarks.setting import LEARNING_RATE, NUM_WORKERS

__all__ = ["World", "in_lock_step", "measure"]

TIMEOUT = timedelta(seconds=60)


class World(NamedTuple):
    """State that the processes share."""

    size: int
    folder: str  # in which they meet
    start: Barrier
    taken: Synchronized[int]  # batches
    steps: Synchronized[int]  # after which all end

    @classmethod
    def of(cls, size: int, folder: str) -> World:
        """For so many processes, all on this machine."""
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        return cls(size, folder, SPAWN.Barrier(size), SPAWN.Value(c_int64, 0), SPAWN.Value(c_int64, sys.maxsize))


def in_lock_step(
    rank: int, world: World, seconds: float, model: nn.Module, backward: Callable[[nn.Module, int], None]
) -> Span:
    """Train together; this process's share of it.

    Args:
        rank: of this process.
        world: of all.
        seconds: how long.
        model: trained in place.
        backward: sets the gradients of the model it is given on the batch of that number.
    """
    meeting = f"file://{world.folder}/meeting"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world.size, timeout=TIMEOUT)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=LEARNING_RATE)

    def update() -> None:
        backward(parallel, take(world.taken))
        optimizer.step()

    def going(span: Span) -> bool:
        if rank == 0 and span.seconds >= seconds:
            # No other process can finish the next step before this one joins it: all end after that step.
            world.steps.value = min(world.steps.value, span.updates + 1)
        return span.updates < world.steps.value

    world.start.wait(timeout=TIMEOUT.seconds)
    span = repeat(update, going)
    distributed.destroy_process_group()
    return span


def measure(seconds: float) -> Measurement:
    """Gradients of both processes together."""
    with TemporaryDirectory() as folder:
        answers = run_process_group(NUM_WORKERS, _train, World.of(NUM_WORKERS, folder), seconds)
    spans, accuracies = zip(*answers, strict=True)
    span = Span.over(spans)
    steps_per_s = (span.updates - NUM_WORKERS) / NUM_WORKERS / span.seconds
    return Measurement.of("ddp_gloo", span, accuracies[0], steps_per_s=steps_per_s)


def _train(rank: int, world: World, seconds: float) -> tuple[Span, float]:
    data = Mnist.load()
    model = network()
    batches = Batches(data, seed=0)
    span = in_lock_step(rank, world, seconds, model, lambda model, batch: backpropagate(model, *batches[batch]))
    return span, accuracy(model, data)


if __name__ == "__main__":
    measured_for(measure, __doc__)
