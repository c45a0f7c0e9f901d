"""PyTorch DistributedDataParallel on gloo: two processes in lock-step.

A step makes one change of the weights out of two gradients. What is compared with the others is *gradients* per second,
the data worked through; steps per second are in the details.

References:
    Li et al. (2020), "PyTorch Distributed: Experiences on Accelerating Data Parallel Training".
"""

from __future__ import annotations

import os
import sys
from ctypes import c_int64
from datetime import timedelta
from itertools import count
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Barrier
from tempfile import TemporaryDirectory

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from tests.benchmarks.crew import SPAWN, run_crew
from tests.benchmarks.measurement import Measurement, Span, measured_for, repeat
from tests.benchmarks.mnist import Batches, Mnist
from tests.benchmarks.network import accuracy, backpropagate, network
from tests.benchmarks.setting import LEARNING_RATE, NUM_WORKERS

__all__ = ["measure"]

TIMEOUT = timedelta(seconds=60)


def measure(seconds: float) -> Measurement:
    """Gradients of both processes together."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meeting"
        answers = run_crew(_train, SPAWN.Barrier(NUM_WORKERS), meeting, SPAWN.Value(c_int64, sys.maxsize), seconds)
    spans, accuracies = zip(*answers, strict=True)
    span = Span.over(spans)
    return Measurement.of(
        "ddp_gloo", span, accuracies[0], steps_per_s=(span.updates - NUM_WORKERS) / NUM_WORKERS / span.seconds
    )


def _train(rank: int, start: Barrier, meeting: str, steps: Synchronized[int], seconds: float) -> tuple[Span, float]:
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=NUM_WORKERS, timeout=TIMEOUT)
    data, model = Mnist.load(), DistributedDataParallel(network())
    batches, indices = Batches(data, seed=0), count(rank, NUM_WORKERS)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)

    def update() -> None:
        backpropagate(model, *batches[next(indices)])
        optimizer.step()

    def going(span: Span) -> bool:
        if rank == 0 and span.seconds >= seconds:
            # The other process cannot finish the next step before this one joins it: both end after that step.
            steps.value = min(steps.value, span.updates + 1)
        return span.updates < steps.value

    start.wait(timeout=TIMEOUT.seconds)
    span = repeat(update, going)
    distributed.destroy_process_group()
    return span, accuracy(model.module, data)


if __name__ == "__main__":
    measured_for(measure, __doc__)
