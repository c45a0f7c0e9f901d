"""Checks of psgd's guarantees on a job's own model and data, on a virtual clock (`psgd verify`).

Every check uses the job's model, data, optimizer and seed. Its consistency, correction, compression and clipping are
replaced by the setting that the check needs. The check with killed workers uses the job's own servers and pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from time import perf_counter
from typing import Any

import numpy as np

from psgd.core.server.optimizers import build_optimizer
from psgd.core.server.partitions import partition_weights
from psgd.core.server.schedules import build_schedule
from psgd.errors import RunError
from psgd.job import OpenJob
from psgd.simulation.cluster import VirtualCluster
from psgd.simulation.faults import Crashes
from psgd.simulation.problem import Problem
from psgd.spec import JobSpec, ScalingConfig
from psgd.spec.changes import override_spec
from psgd.spec.reader import as_spec
from psgd_workers.counting import counted
from psgd_workers.messages import BatchId, EpochGrid, FloatArray
from psgd_workers.models import build_model

__all__ = ["Check", "verify"]

_Observation = tuple[str, bool]  # (description of the observation, True if the promise holds)

WORKERS = 4  # number of workers in the checks with several workers
SERVERS = 3  # number of servers in the check of partitions
STEPS = (1e-2, 1e-3, 3e-4)  # lengths of the steps along the gradient, in units of weights
PIECES = 5  # number of pieces into which a tensor is divided
LEAST_SLOPE = 1e-2  # shortest direction that is checked, relative to the length of the gradient
SLOPE_TOLERANCE = 0.02  # largest relative difference; kinks of the loss and float32 do not allow a much smaller one
BIG_BATCH_TOLERANCE = 1e-4  # largest difference, relative to the largest change of a weight: sums in another order
GRADIENTS = 60  # approximate number of gradients that all checks together compute for each batch of the trial epoch
MAX_TRIAL_BATCHES = 64  # largest number of batches in the trial epoch


@dataclass(frozen=True, slots=True)
class Check:
    """A promise and its observation."""

    name: str
    promised: str
    observed: str
    holds: bool


def verify(spec: JobSpec | Mapping[str, Any], limit_s: float = 40.0) -> list[Check]:
    """Check every promise on a job.

    Args:
        spec: the job, or a mapping with the fields of a job file.
        limit_s: approximate time limit, in seconds. A slow model is checked on fewer batches.

    Raises:
        InputError: the job's data or model cannot be used.
    """
    spec = as_spec(spec)
    neutral = [
        "consistency={mode: async}",
        "correction={name: none}",
        "compression={name: none}",
        "optimizer.max_grad_norm=null",
        "optimizer.clip_value=null",
        "scaling.servers=1",
        "scaling.pipeline=0",
        "run={epochs: 1}",
        "checkpoint={every_s: null}",
        "failure={timeout_s: 1e12, max_failures: -1}",
    ]
    job = OpenJob.open(override_spec(spec, neutral))
    # Raises an error if the weights cannot be divided among the job's servers.
    partition_weights(len(job.weights), job.layout.num_trainable, spec.scaling.servers)
    trial = _Trial(job, spec.scaling, limit_s)
    bsp = f"bsp of {WORKERS} workers"
    servers = min(SERVERS, len(job.weights))
    return [
        _check(
            "gradient",
            f"is the slope of the loss, within {SLOPE_TOLERANCE:.0%}, tensor by tensor",
            trial.check_gradient,
        ),
        _check(
            "a batch computed again", "is the same gradient on every worker, bit for bit", trial.check_repeated_batch
        ),
        _check("1 asynchronous worker", "is a serial loop of the optimizer, bit for bit", trial.check_serial),
        _check(bsp, f"steps on the mean of {WORKERS} gradients, bit for bit", trial.check_mean),
        _check(
            bsp,
            f"is one worker with batches {WORKERS} times as large, within {BIG_BATCH_TOLERANCE} of the way",
            trial.check_large_batch,
        ),
        _check(
            f"{servers} partitions",
            "hold the weights that 1 does, bit for bit",
            lambda: trial.check_partitions(servers),
        ),
        _check("kill and resume", "ends as if undisturbed (1 worker), bit for bit", trial.check_resume),
        _check(
            "killed workers",
            f"leave each of {trial.num_batches} batches in the weights exactly once",
            trial.check_killed_workers,
        ),
    ]


def _check(name: str, promised: str, observe: Callable[[], _Observation]) -> Check:
    """Check one promise. A trial that does not finish breaks it."""
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            observed, holds = observe()
    except _TrialError as error:
        observed = str(error)
        holds = False
    return Check(name, promised, observed, holds)


class _TrialError(RunError):
    """The training of a trial did not finish."""


class _Trial:
    """The checks, on one epoch of a few batches of the job's first shard."""

    def __init__(self, job: OpenJob, scaling: ScalingConfig, limit_s: float) -> None:
        self._job = job
        self._scaling = scaling
        self._worker = job.worker("trial")
        out = np.empty_like(job.weights)
        began = perf_counter()
        self._gradient_deadline = began + limit_s / 2  # end of the check of the gradient
        self._worker.gradient(BatchId(0, 0, 0), job.weights, out)
        affordable = limit_s / (perf_counter() - began) / GRADIENTS
        whole = job.shards.grid.batches_per_shard[0]
        num_batches = int(max(2, min(whole, MAX_TRIAL_BATCHES, affordable)))
        grid = job.shards.grid
        examples = sum(grid.examples(BatchId(0, 0, index)) for index in range(num_batches))
        self._grid = EpochGrid((num_batches,), examples, grid.batch_size, (examples,))

    def _with(self, *overrides: str) -> JobSpec:
        """Return the trial's job with some fields replaced."""
        return override_spec(self._job.spec, overrides)

    @property
    def num_batches(self) -> int:
        """Number of batches in the trial epoch."""
        return self._grid.num_batches

    def _run(self, spec: JobSpec, **options: Any) -> VirtualCluster:
        """Train the trial epoch on a virtual cluster."""
        job = self._job
        problem = Problem(self._grid, job.weights, self._worker.gradient, job.layout.num_trainable)
        run = VirtualCluster(spec, problem, _uneven_s, **options).run()
        if run.finish is None or run.finish.status != "finished":
            raise _TrialError(f"{run.finish.error if run.finish else 'the trial did not end'}")
        return run

    def _batches(self) -> Iterator[BatchId]:
        return (self._grid.batch(0, position) for position in range(self._grid.num_batches))

    # Checks

    def check_gradient(self) -> _Observation:
        """Compare the gradient with central differences of the loss, along each tensor's gradient and pieces of it."""
        job = self._job
        batch = BatchId(0, 0, 0)
        slope = np.empty_like(job.weights)
        self._worker.gradient(batch, job.weights, slope)
        if not np.isfinite(slope).all():
            return "the gradient of the first batch is not finite", False
        slope[job.layout.num_trainable :] = 0
        if not slope.any():
            return "the gradient is zero in every tensor: training changes nothing", False
        tensors = {name: tensor for name, tensor in job.layout.views(slope).items() if tensor.any()}
        worst = 0.0
        where = "no tensor"
        tried = 0
        for name in sorted(tensors, key=lambda name: -float(np.linalg.norm(tensors[name]))):
            if perf_counter() > self._gradient_deadline:
                break
            tried += 1
            for rows in _pieces(tensors[name].size):
                direction = np.zeros_like(job.weights)
                job.layout.views(direction)[name].reshape(-1)[rows] = tensors[name].reshape(-1)[rows]
                error = self._slope_error(batch, slope, direction)
                if error > worst:
                    worst = error
                    where = name
        observed = f"differs by {worst:.2g} at most, in {where}; {tried} of {len(tensors)} tensors tried"
        return observed, bool(worst <= SLOPE_TOLERANCE)

    def _slope_error(self, batch: BatchId, slope: FloatArray, direction: FloatArray) -> float:
        """Return the relative error of the slope along a direction, for the best of several steps.

        Long steps meet kinks of the loss, and short steps float32's rounding.
        """
        length = float(np.linalg.norm(direction))
        if length < LEAST_SLOPE * float(np.linalg.norm(slope)):
            return 0.0  # too small a slope to measure
        expected = float(np.dot(slope, direction)) / length
        errors = []
        out = np.empty_like(slope)
        for step in STEPS:
            move = direction * np.float32(step / length)
            ahead, behind = (self._worker.gradient(batch, self._job.weights + sign * move, out) for sign in (1, -1))
            errors.append(abs((ahead - behind) / (2 * step) - expected) / abs(expected))
        return min(errors)

    def check_repeated_batch(self) -> _Observation:
        """Compare the gradients of two workers for the same batch and weights."""
        job = self._job
        batch = BatchId(0, 0, self._grid.num_batches - 1)
        first = np.empty_like(job.weights)
        second = np.empty_like(job.weights)
        self._worker.gradient(batch, job.weights, first)
        job.worker("other").gradient(batch, job.weights, second)
        return _compare(first, second)

    def check_serial(self) -> _Observation:
        """Compare one asynchronous worker with a serial loop."""
        weights = self._serial_loop(self._batches())
        return _compare(self._run(self._with("scaling.workers=1")).weights, weights)

    def check_mean(self) -> _Observation:
        """Compare bsp with a loop over means of gradients, weighted by their numbers of examples."""
        run = self._run(self._with(f"scaling.workers={WORKERS}", "consistency={mode: bsp}"))
        return _compare(run.weights, self._loop_over_rounds(self._mean))

    def check_large_batch(self) -> _Observation:
        """Compare bsp with steps on one batch that holds all examples of a round."""
        if self._job.layout.num_trainable < self._job.layout.num_parameters:
            return "not tried, because the model's buffers depend on the batch", True
        run = self._run(self._with(f"scaling.workers={WORKERS}", "consistency={mode: bsp}"))
        weights = self._loop_over_rounds(self._as_one_batch)
        moved = float(np.abs(weights - self._job.weights).max())
        difference = float(np.abs(run.weights - weights).max()) / (moved + 1e-12)
        return f"differs by {difference:.2g}", bool(difference <= BIG_BATCH_TOLERANCE)

    def check_partitions(self, servers: int) -> _Observation:
        """Compare several servers with one, for the same order of pushes."""
        one, several = (
            self._run(self._with(f"scaling.workers={WORKERS}", f"scaling.servers={number}")) for number in (1, servers)
        )
        return _compare(several.weights, one.weights)

    def check_resume(self) -> _Observation:
        """Compare a run that is stopped and resumed from its checkpoint with an uninterrupted one."""
        whole = self._run(self._with("scaling.workers=1"))
        half = max(1, self._grid.num_batches // 2)
        first = self._run(self._with("scaling.workers=1", f"run.max_updates={half}"))
        second = self._run(self._with("scaling.workers=1"), resume=first.checkpoint)
        return _compare(second.weights, whole.weights)

    def check_killed_workers(self) -> _Observation:
        """Count the batches that are applied while workers are killed."""
        scaling = self._scaling
        spec = self._with(f"scaling={{workers: {WORKERS}, servers: {scaling.servers}, pipeline: {scaling.pipeline}}}")
        random = np.random.default_rng(0)
        status = self._run(spec, faults=Crashes(lambda: float(random.exponential(1.5)), seed=1)).status
        counts = status.ledger
        killed = counted(status.charged_failures, "worker")
        observed = f"{counts.applied} applied, {counts.batches} different, {killed} killed"
        return observed, counts.applied == counts.batches == self.num_batches

    # References

    def _serial_loop(self, batches: Iterator[BatchId]) -> FloatArray:
        """Return the weights after one step on each gradient, in the order of the batches."""
        return self._train((self._gradient, (batch,)) for batch in batches)

    def _loop_over_rounds(self, gradient: Callable[[FloatArray, tuple[BatchId, ...]], FloatArray]) -> FloatArray:
        """Return the weights after one step for each round of `WORKERS` batches."""
        batches = list(self._batches())
        num_rounds = ceil(len(batches) / WORKERS)
        rounds = [tuple(batches[i * WORKERS : (i + 1) * WORKERS]) for i in range(num_rounds)]
        return self._train((gradient, members) for members in rounds)

    def _train(
        self,
        rounds: Iterator[tuple[Callable[[FloatArray, tuple[BatchId, ...]], FloatArray], tuple[BatchId, ...]]],
    ) -> FloatArray:
        """Return the weights after one optimizer step for each (function that computes the gradient, batches)."""
        spec = self._job.spec.optimizer
        trainable = self._job.layout.num_trainable
        weights = self._job.weights.copy()
        optimizer = build_optimizer(spec, trainable)
        schedule = build_schedule(spec.schedule, spec.lr, self._grid.num_examples)
        seen = 0
        for gradient, members in rounds:
            change = gradient(weights, members)
            if not np.isfinite(change).all():
                raise _TrialError(f"training diverges: the gradient of {members[0]} is not finite. Lower optimizer.lr")
            optimizer.step(weights[:trainable], change[:trainable], schedule.rate(seen))
            weights[trainable:] -= change[trainable:]
            seen += sum(self._grid.examples(batch) for batch in members)
        return weights

    def _gradient(self, weights: FloatArray, members: tuple[BatchId, ...]) -> FloatArray:
        """Return the gradient of the only batch in `members`."""
        (batch,) = members
        out = np.empty_like(weights)
        self._worker.gradient(batch, weights, out)
        return out

    def _mean(self, weights: FloatArray, members: tuple[BatchId, ...]) -> FloatArray:
        """Return the mean of the batches' gradients, weighted by their numbers of examples."""
        gradients = [self._gradient(weights, (batch,)) for batch in members]
        if len(members) == 1:
            return gradients[0]
        examples = [self._grid.examples(batch) for batch in members]
        total = np.zeros_like(weights)
        for gradient, number in zip(gradients, examples, strict=True):
            total += np.multiply(gradient, number * len(members) / sum(examples))
        total /= len(members)
        return total

    def _as_one_batch(self, weights: FloatArray, members: tuple[BatchId, ...]) -> FloatArray:
        """Return the model's gradient of one batch that holds the examples of all batches in `members`."""
        job = self._job
        out = np.empty_like(weights)
        rows = np.concatenate([job.shards.rows(batch) for batch in members])
        model = build_model(job.spec.model, job.dataset)
        train = job.dataset.train
        model.loss_and_gradient(
            job.layout.views(weights), train.inputs(rows), train.labels[rows], job.layout.views(out), 0
        )
        return out


def _pieces(size: int) -> list[slice]:
    """Return slices of a tensor's values: all of them, and `PIECES` pieces, in which an error of one row is larger."""
    ends = np.linspace(0, size, min(PIECES, size) + 1).astype(int).tolist()
    return [slice(None), *(slice(start, stop) for start, stop in pairwise(ends))]


def _uneven_s(worker: str, batch: BatchId) -> float:
    """Return virtual seconds of a gradient that let workers overtake each other."""
    return float(0.05 + 0.2 * np.random.default_rng([int(worker.removeprefix("worker-")), *batch]).random())


def _compare(weights: FloatArray, expected: FloatArray) -> _Observation:
    """Compare two vectors bit for bit."""
    if np.array_equal(weights, expected):
        return "the same bits", True
    return f"differs by up to {float(np.abs(weights - expected).max()):.3g}", False
