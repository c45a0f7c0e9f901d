"""PyTorch DistributedDataParallel on gloo: processes in lock-step.

A step averages one gradient of each process. The measured speed is *gradients* per second, as for the other peers;
steps per second are in the details. Each process takes its batches from a shared counter, as in `hogwild`, so that no
process is late with batches of its own.

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

from tests.benchmarks.measurement import Measurement, Span, repeat, run_command_line
from tests.benchmarks.mnist import Batches, Mnist
from tests.benchmarks.network import accuracy, backpropagate, network
from tests.benchmarks.process_group import SPAWN, run_process_group, take
from tests.benchmarks.setting import LEARNING_RATE, NUM_WORKERS

__all__ = ["World", "in_lock_step", "measure"]

TIMEOUT = timedelta(seconds=60)


class World(NamedTuple):
    """The state that all processes share."""

    size: int
    folder: str  # of the rendezvous file
    start: Barrier
    taken: Synchronized[int]  # batches taken so far
    steps: Synchronized[int]  # number of steps after which all processes end

    @classmethod
    def of(cls, size: int, folder: str) -> World:
        """Return the shared state of `size` processes on this machine."""
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        return cls(size, folder, SPAWN.Barrier(size), SPAWN.Value(c_int64, 0), SPAWN.Value(c_int64, sys.maxsize))


def in_lock_step(
    rank: int, world: World, seconds: float, model: nn.Module, backward: Callable[[nn.Module, int], None]
) -> Span:
    """Train in lock-step with the other processes, and return the span of this process.

    Args:
        rank: rank of this process.
        world: state shared with the other processes.
        seconds: duration of the training.
        model: the model, trained in place.
        backward: given a model and the number of a batch, sets the model's gradients.
    """
    rendezvous = f"file://{world.folder}/rendezvous"
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world.size, timeout=TIMEOUT)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=LEARNING_RATE)

    def update() -> None:
        backward(parallel, take(world.taken))
        optimizer.step()

    def going(span: Span) -> bool:
        if rank == 0 and span.seconds >= seconds:
            # No other process can finish the next step without this one, so all of them end after that step.
            world.steps.value = min(world.steps.value, span.updates + 1)
        return span.updates < world.steps.value

    world.start.wait(timeout=TIMEOUT.seconds)
    span = repeat(update, going)
    distributed.destroy_process_group()
    return span


def measure(seconds: float) -> Measurement:
    """Measure the gradients per second of both processes together."""
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
    run_command_line(measure, __doc__)
