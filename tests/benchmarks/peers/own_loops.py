"""The limit: psgd's own backpropagation and a plain step, in each of two processes that share nothing.

`psgd_job` is slower than that by the work of applying the gradients of both workers to the same weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from multiprocessing.synchronize import Barrier

import numpy as np

from psgd.job import OpenJob
from psgd.spec import JobSpec
from psgd.spec.changes import override_spec
from tests.benchmarks.measurement import Measurement, Span, repeat
from tests.benchmarks.peers.psgd_job import job, run_job_command_line
from tests.benchmarks.process_group import SPAWN, run_process_group
from tests.benchmarks.setting import NUM_WORKERS

__all__ = ["OwnLoop", "measure"]


class OwnLoop:
    """Serial SGD with the worker of a job.

    Args:
        spec: the job.
    """

    def __init__(self, spec: JobSpec) -> None:
        opened = OpenJob.open(spec)
        self.weights = opened.weights  # [num_parameters]
        self._rate = spec.optimizer.lr
        self._worker = opened.worker("loop")
        self._gradient = np.empty_like(self.weights)
        self._grid = opened.shards.grid
        self._validation = opened.dataset.validation

    def step(self, number: int) -> None:
        """Take a step on a batch, counted from 0 through all epochs: w ← w - η·g, in place."""
        batch = self._grid.batch(*divmod(number, self._grid.num_batches))
        self._worker.gradient(batch, self.weights, self._gradient)
        self._gradient *= self._rate
        self.weights -= self._gradient

    def accuracy(self) -> float:
        """Return the accuracy on the validation part."""
        assert self._validation is not None
        return self._worker.evaluate(self.weights, self._validation).accuracy or 0.0


def measure(seconds: float, settings: Sequence[str] = ()) -> Measurement:
    """Measure the updates per second of both loops together.

    Args:
        seconds: duration of the loops.
        settings: overrides of the job.
    """
    answers = run_process_group(NUM_WORKERS, _loop, SPAWN.Barrier(NUM_WORKERS), seconds, settings)
    spans, accuracies = zip(*answers, strict=True)
    return Measurement.of("own_loops", Span.over(spans), accuracies[0])


def _loop(rank: int, start: Barrier, seconds: float, settings: Sequence[str]) -> tuple[Span, float]:
    spec = JobSpec.model_validate(job(seconds) | {"seed": rank})
    loop = OwnLoop(override_spec(spec, settings))
    numbers = count()
    start.wait(timeout=60)
    span = repeat(lambda: loop.step(next(numbers)), lambda span: span.seconds < seconds)
    return span, loop.accuracy()


if __name__ == "__main__":
    run_job_command_line(measure, __doc__)
