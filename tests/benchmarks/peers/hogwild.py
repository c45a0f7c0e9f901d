"""PyTorch Hogwild: two processes write to one shared model without locks.

Each process takes its batches from a shared counter, so that a slow process holds no batch back.

References:
    Recht, Re, Wright, Niu (2011), "Hogwild!: A Lock-Free Approach to Parallelizing Stochastic Gradient Descent".
    https://docs.pytorch.org/docs/stable/notes/multiprocessing.html
"""

from __future__ import annotations

from ctypes import c_int64
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Barrier

import torch
from torch import nn

from tests.benchmarks.measurement import Measurement, Span, repeat, run_command_line
from tests.benchmarks.mnist import Batches, Mnist
from tests.benchmarks.network import accuracy, backpropagate, network
from tests.benchmarks.process_group import SPAWN, run_process_group, take
from tests.benchmarks.setting import LEARNING_RATE, NUM_WORKERS

__all__ = ["measure"]


def measure(seconds: float) -> Measurement:
    """Measure the updates per second of both processes together."""
    model = network()
    model.share_memory()
    spans = run_process_group(NUM_WORKERS, _train, SPAWN.Barrier(NUM_WORKERS), SPAWN.Value(c_int64, 0), model, seconds)
    return Measurement.of("hogwild", Span.over(spans), accuracy(model, Mnist.load()))


def _train(rank: int, start: Barrier, taken: Synchronized[int], model: nn.Module, seconds: float) -> Span:
    torch.set_num_threads(1)
    batches = Batches(Mnist.load(), seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)

    def update() -> None:
        backpropagate(model, *batches[take(taken)])
        optimizer.step()

    start.wait(timeout=60)
    return repeat(update, lambda span: span.seconds < seconds)


if __name__ == "__main__":
    run_command_line(measure, __doc__)
