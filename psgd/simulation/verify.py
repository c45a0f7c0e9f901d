"""Verify: what psgd promises, tried on a job's own model and data, on a virtual clock.

Whatever a job asks for, these equalities are of its model, data, optimizer and seed; consistency, correction,
compression and clipping are replaced by what each check is about. Its own servers and pipeline are what crashes hit.
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
from psgd_workers.messages import BatchId, EpochGrid, FloatArray
from psgd_workers.models import build_model

__all__ = ["Check", "verify"]

_Seen = tuple[str, bool]  # what was observed, and whether it is what was promised

WORKERS = 4
SERVERS = 3
STEPS = (1e-2, 1e-3, 3e-4)  # along the gradient, in units of weights
PIECES = 5  # of a tensor
LEAST_SLOPE = 1e-2  # of the whole gradient's length
SLOPE_TOLERANCE = 0.02  # relative: kinks and float32 allow no much finer differences
BIG_BATCH_TOLERANCE = 1e-4  # of the largest weight's movement: sums in another order
GRADIENTS = 60  # computed for each batch of the trial epoch, over all checks, about
MOST_BATCHES = 64


@dataclass(frozen=True, slots=True)
class Check:
    """One promise, and what was seen of it."""

    name: str
    promised: str
    observed: str
    holds: bool


def verify(spec: JobSpec | Mapping[str, Any], limit_s: float = 40.0) -> list[Check]:
    """Try every promise.

    Args:
        spec: the job, or a mapping with the fields of a job file.
        limit_s: seconds it may take, about; slow models are tried on fewer batches.

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
    partition_weights(
        len(job.weights), job.layout.num_trainable, spec.scaling.servers
    )  # so many servers must be possible
    trial = _Trial(job, spec.scaling, limit_s)
    bsp = f"bsp of {WORKERS} workers"
    servers = min(SERVERS, len(job.weights))
    return [
        _check("gradient", f"is the slope of the loss, within {SLOPE_TOLERANCE:.0%}, tensor by tensor", trial.gradient),
        _check("a batch computed again", "is the same gradient on every worker, bit for bit", trial.same_twice),
        _check("1 asynchronous worker", "is a serial loop of the optimizer, bit for bit", trial.serial),
        _check(bsp, f"steps on the mean of {WORKERS} gradients, bit for bit", trial.mean_of_n),
        _check(
            bsp,
            f"is one worker with batches {WORKERS} times as large, within {BIG_BATCH_TOLERANCE} of the way",
            trial.big_batch,
        ),
        _check(f"{servers} partitions", "hold the weights that 1 does, bit for bit", lambda: trial.partitions(servers)),
        _check("kill and resume", "ends as if undisturbed (1 worker), bit for bit", trial.resumed),
        _check(
            "killed workers",
            f"leave each of {trial.num_batches} batches in the weights exactly once",
            trial.crashes,
        ),
    ]


def _check(name: str, promised: str, attempt: Callable[[], _Seen]) -> Check:
    """Try one promise; a trial that cannot be finished breaks it."""
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            observed, holds = attempt()
    except _TrialError as error:
        observed = str(error)
        holds = False
    return Check(name, promised, observed, holds)


class _TrialError(RunError):
    """A trial that did not come to its end."""


class _Trial:
    """One epoch of a few batches of the job's first shard."""

    def __init__(self, job: OpenJob, scaling: ScalingConfig, limit_s: float) -> None:
        self._job = job
        self._scaling = scaling
        self._worker = job.worker("trial")
        out = np.empty_like(job.weights)
        began = perf_counter()
        self._until = began + limit_s / 2  # for the gradient's check
        self._worker.gradient(BatchId(0, 0, 0), job.weights, out)
        affordable = limit_s / (perf_counter() - began) / GRADIENTS
        whole = job.shards.grid.batches_per_shard[0]
        number = int(max(2, min(whole, MOST_BATCHES, affordable)))
        examples = sum(self._examples(BatchId(0, 0, index)) for index in range(number))
        self._grid = EpochGrid((number,), examples)

    def _examples(self, batch: BatchId) -> int:
        return len(self._job.shards.rows(batch))

    def _spec(self, *overrides: str) -> JobSpec:
        return override_spec(self._job.spec, overrides)

    @property
    def num_batches(self) -> int:
        """Batches of the trial epoch."""
        return self._grid.num_batches

    def _run(self, spec: JobSpec, **options: Any) -> VirtualCluster:
        job = self._job
        problem = Problem(self._grid, job.weights, self._worker.gradient, job.layout.num_trainable, self._examples)
        run = VirtualCluster(spec, problem, options.pop("compute_s", _uneven), **options).run()
        if run.finish is None or run.finish.status != "finished":
            raise _TrialError(f"{run.finish.error if run.finish else 'it has no end'}")
        return run

    def _batches(self) -> Iterator[BatchId]:
        return (self._grid.batch(0, position) for position in range(self._grid.num_batches))

    # Checks

    def gradient(self) -> _Seen:
        """Compare with central differences of the loss along each tensor's gradient, and along parts of it."""
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
            if perf_counter() > self._until:
                break
            tried += 1
            for rows in _parts(tensors[name].size):
                direction = np.zeros_like(job.weights)
                job.layout.views(direction)[name].reshape(-1)[rows] = tensors[name].reshape(-1)[rows]
                error = self._slope_error(batch, slope, direction)
                if error > worst:
                    worst = error
                    where = name
        told = f"differs by {worst:.2g} at most, in {where}; {tried} of {len(tensors)} tensors tried"
        return told, bool(worst <= SLOPE_TOLERANCE)

    def _slope_error(self, batch: BatchId, slope: FloatArray, direction: FloatArray) -> float:
        """Relative to the slope, by the best of some steps: long ones meet kinks, short ones float32's rounding."""
        length = float(np.linalg.norm(direction))
        if length < LEAST_SLOPE * float(np.linalg.norm(slope)):
            return 0.0  # too flat to be measured
        told = float(np.dot(slope, direction)) / length
        errors = []
        out = np.empty_like(slope)
        for step in STEPS:
            move = direction * np.float32(step / length)
            ahead, behind = (self._worker.gradient(batch, self._job.weights + sign * move, out) for sign in (1, -1))
            errors.append(abs((ahead - behind) / (2 * step) - told) / abs(told))
        return min(errors)

    def same_twice(self) -> _Seen:
        """The same batch and weights, on two workers."""
        job = self._job
        batch = BatchId(0, 0, self._grid.num_batches - 1)
        first = np.empty_like(job.weights)
        second = np.empty_like(job.weights)
        self._worker.gradient(batch, job.weights, first)
        job.worker("other").gradient(batch, job.weights, second)
        return _same(first, second)

    def serial(self) -> _Seen:
        """One asynchronous worker against a loop."""
        weights = self._loop(self._batches())
        return _same(self._run(self._spec("scaling.workers=1")).weights, weights)

    def mean_of_n(self) -> _Seen:
        """bsp against a loop over means, weighted by examples."""
        run = self._run(self._spec(f"scaling.workers={WORKERS}", "consistency={mode: bsp}"))
        return _same(run.weights, self._rounds(self._mean))

    def big_batch(self) -> _Seen:
        """bsp against steps on one batch of all the examples of a round."""
        if self._job.layout.num_trainable < self._job.layout.num_parameters:
            return "not tried: the model's buffers depend on the batch", True
        run = self._run(self._spec(f"scaling.workers={WORKERS}", "consistency={mode: bsp}"))
        weights = self._rounds(self._together)
        moved = float(np.abs(weights - self._job.weights).max())
        difference = float(np.abs(run.weights - weights).max()) / (moved + 1e-12)
        return f"differs by {difference:.2g}", bool(difference <= BIG_BATCH_TOLERANCE)

    def partitions(self, servers: int) -> _Seen:
        """Some servers against one, for one order of pushes."""
        one, some = (
            self._run(self._spec(f"scaling.workers={WORKERS}", f"scaling.servers={number}")) for number in (1, servers)
        )
        return _same(some.weights, one.weights)

    def resumed(self) -> _Seen:
        """A run that ends in the middle, and goes on from its checkpoint."""
        whole = self._run(self._spec("scaling.workers=1"))
        half = max(1, self._grid.num_batches // 2)
        first = self._run(self._spec("scaling.workers=1", f"run.max_updates={half}"))
        second = self._run(self._spec("scaling.workers=1"), resume=first.checkpoint)
        return _same(second.weights, whole.weights)

    def crashes(self) -> _Seen:
        """Workers die on the way."""
        scaling = self._scaling
        spec = self._spec(f"scaling={{workers: {WORKERS}, servers: {scaling.servers}, pipeline: {scaling.pipeline}}}")
        random = np.random.default_rng(0)
        status = self._run(spec, faults=Crashes(lambda: float(random.exponential(1.5)), seed=1)).status
        counts = status.ledger
        observed = f"{counts.applied} applied, {counts.batches} different, {status.charged_failures} workers killed"
        return observed, counts.applied == counts.batches == self.num_batches

    # What it is compared with

    def _loop(self, batches: Iterator[BatchId]) -> FloatArray:
        """The optimizer's steps, one gradient after the other."""
        return self._steps((self._gradient, (batch,)) for batch in batches)

    def _rounds(self, gradient: Callable[[FloatArray, tuple[BatchId, ...]], FloatArray]) -> FloatArray:
        batches = list(self._batches())
        number = ceil(len(batches) / WORKERS)
        rounds = [tuple(batches[i * WORKERS : (i + 1) * WORKERS]) for i in range(number)]
        return self._steps((gradient, members) for members in rounds)

    def _steps(
        self,
        rounds: Iterator[tuple[Callable[[FloatArray, tuple[BatchId, ...]], FloatArray], tuple[BatchId, ...]]],
    ) -> FloatArray:
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
            seen += sum(self._examples(batch) for batch in members)
        return weights

    def _gradient(self, weights: FloatArray, members: tuple[BatchId, ...]) -> FloatArray:
        (batch,) = members
        out = np.empty_like(weights)
        self._worker.gradient(batch, weights, out)
        return out

    def _mean(self, weights: FloatArray, members: tuple[BatchId, ...]) -> FloatArray:
        gradients = [self._gradient(weights, (batch,)) for batch in members]
        if len(members) == 1:
            return gradients[0]
        examples = [self._examples(batch) for batch in members]
        total = np.zeros_like(weights)
        for gradient, number in zip(gradients, examples, strict=True):
            total += np.multiply(gradient, number * len(members) / sum(examples))
        total /= len(members)
        return total

    def _together(self, weights: FloatArray, members: tuple[BatchId, ...]) -> FloatArray:
        """All examples of a round as one batch, through the model itself."""
        job = self._job
        out = np.empty_like(weights)
        rows = np.concatenate([job.shards.rows(batch) for batch in members])
        model = build_model(job.spec.model, job.dataset)
        train = job.dataset.train
        views = job.layout.views(weights), job.layout.views(out)
        model.loss_and_gradient(views[0], train.inputs(rows), train.labels[rows], views[1], 0)
        return out


def _parts(size: int) -> list[slice]:
    """All values, and some pieces of them: what is wrong in one row shows more in a piece."""
    ends = np.linspace(0, size, min(PIECES, size) + 1).astype(int).tolist()
    return [slice(None), *(slice(start, stop) for start, stop in pairwise(ends))]


def _uneven(worker: str, batch: BatchId) -> float:
    """Virtual seconds that make workers overtake each other."""
    return float(0.05 + 0.2 * np.random.default_rng([int(worker.removeprefix("worker-")), *batch]).random())


def _same(found: FloatArray, expected: FloatArray) -> _Seen:
    if np.array_equal(found, expected):
        return "the same bits", True
    return f"differs by up to {float(np.abs(found - expected).max()):.3g}", False
