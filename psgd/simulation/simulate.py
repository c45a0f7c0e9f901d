"""Simulation of one job on a virtual clock: what quality it reaches with a number of workers, and how fast."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from psgd.core.server.consistency import build_consistency
from psgd.core.server.journal import OUTCOMES, RecordKind
from psgd.core.server.report import staleness_summary
from psgd.errors import SpecError
from psgd.job import OpenJob
from psgd.simulation.cluster import VirtualCluster
from psgd.simulation.faults import Crashes, FaultPlan
from psgd.simulation.observer import ClusterObserver
from psgd.simulation.problem import Problem, Timing
from psgd.simulation.quadratic import Quadratic
from psgd.simulation.scenario import Scenario
from psgd.spec import JobSpec, SimulationTarget
from psgd_workers.messages import BatchId, Evaluation, FloatArray, Outcome

__all__ = [
    "ROW_NAMES",
    "JobWorkload",
    "Point",
    "QuadraticWorkload",
    "SimulationResult",
    "Workload",
    "row_values",
    "simulate",
]

POINTS = 200  # approximate number of points in a curve
EARLY_POINTS = 16  # points between n and 2n updates at the start of a curve, where the metric changes most

# Durations of the driver's work, as multiples of a gradient's mean time. They correspond to a real run in which a batch
# takes some tens of milliseconds.
CALL = 0.02  # a message between the driver and a worker or server
POLL = 4.0  # longest time that a server delays a report
LEASE = 100.0  # work in a lease

USED = (OUTCOMES[Outcome.APPLIED], OUTCOMES[Outcome.BUFFERED])  # outcomes of gradients that a server uses


class Point(NamedTuple):
    """A measurement of the metric."""

    time_s: float  # virtual seconds since training began
    examples: int  # number of examples applied
    value: float


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """The result of one simulated job. Times are in virtual seconds since training began."""

    name: str
    status: str
    metric: str
    value: float  # value of the metric, at the end
    time_s: float
    updates: int
    examples: int  # number of examples applied
    updates_per_s: float
    examples_per_s: float
    time_to_target_s: float | None  # None: there is no target, or the run did not reach it
    examples_to_target: int | None
    pushes: dict[str, int]  # number of pushes by outcome
    staleness: dict[str, float | None]  # mean, p50, p95, max
    staleness_counts: dict[int, int]  # staleness -> number of gradients
    shares: dict[str, float]  # worker -> its share of the gradients in the weights
    crashes: int  # number of crashes of workers
    curve: tuple[Point, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain values, with the points of the curve as lists [time, examples, value]."""
        return asdict(self) | {"curve": [list(point) for point in self.curve]}


class Workload(Protocol):
    """A training problem, and the metric that says how good its weights are."""

    metric: str
    cheap: bool  # True if `measure` costs no more than a step; a target is then checked after every step

    def problem(self) -> Problem:
        """Return the training problem for a new run."""

    def measure(self, cluster: VirtualCluster) -> float:
        """Measure the metric now."""


class QuadraticWorkload:
    """A quadratic function, which shows the effect of a mode without any model or data.

    Args:
        size: number of parameters.
        pushes: largest number of pushes.
        seed: seed of the gradients' noise.
    """

    metric = "excess"
    cheap = True

    def __init__(self, size: int, pushes: int, seed: int) -> None:
        self._size = size
        self._pushes = pushes
        self._seed = seed
        self._quadratic = Quadratic(size, seed=seed)

    def problem(self) -> Problem:
        """Return the quadratic at its initial point, with its noise drawn anew from the seed."""
        self._quadratic = Quadratic(self._size, seed=self._seed)
        return self._quadratic.problem(self._pushes)

    def measure(self, cluster: VirtualCluster) -> float:
        """Return the function's value at the weights minus its minimum."""
        return self._quadratic.excess(cluster.weights)


class JobWorkload:
    """A job's own model and data.

    Args:
        job: the job.
        metric: metric to measure. None: the validation loss, or the training loss if there is no validation data.

    Raises:
        SpecError: the job does not have this metric.
    """

    cheap = False

    def __init__(self, job: OpenJob, metric: str | None = None) -> None:
        validates = job.dataset.validation is not None
        self.metric = metric or ("val/loss" if validates else "train/loss")
        if self.metric == "excess" or (self.metric.startswith("val/") and not validates):
            known = "val/loss" if validates else "train/loss"
            raise SpecError(f"--until asks for {self.metric}, which this job does not have: use {known}")
        if self.metric == "val/accuracy" and job.dataset.classes is None:
            raise SpecError("--until asks for val/accuracy, but the labels are not classes: use val/loss")
        self._job = job
        self._worker = job.worker("simulated")
        self._losses: list[float] = []

    def problem(self) -> Problem:
        """Return the job's training problem, with its initial weights."""
        job = self._job
        self._losses = []
        shards = job.shards
        return Problem(
            shards.grid,
            job.weights,
            self._gradient,
            job.layout.num_trainable,
        )

    def _gradient(self, batch: BatchId, weights: FloatArray, out: FloatArray) -> float:
        loss = self._worker.gradient(batch, weights, out)
        self._losses.append(loss)
        return loss

    def measure(self, cluster: VirtualCluster) -> float:
        """Return the validation metric, or the mean training loss of the batches computed since the last call."""
        losses = self._losses
        self._losses = []
        if self.metric == "train/loss":
            return float(np.mean(losses)) if losses else float("nan")
        assert self._job.dataset.validation is not None
        evaluation: Evaluation = self._worker.evaluate(cluster.weights, self._job.dataset.validation)
        return evaluation.loss if self.metric == "val/loss" else float(evaluation.accuracy or 0)


class _GradientCounter(ClusterObserver):
    """Counts the gradients of each worker that the first server uses, from its journal.

    Attributes:
        counts: number of gradients by worker, whose names are bytes as in the journal.
    """

    def __init__(self) -> None:
        self.counts = Counter[bytes]()

    def journalled(self, cluster: VirtualCluster, partition: int, records: NDArray[np.void]) -> None:
        """Count the gradients in the newest records."""
        del cluster
        if partition == 0:
            used = (records["kind"] == RecordKind.PUSH) & np.isin(records["outcome"], USED)
            self.counts.update(records["worker"][used].tolist())


def _joins(scenario: Scenario) -> Callable[[str], float]:
    """Return a function worker -> virtual seconds until it joins."""
    random = np.random.default_rng([scenario.seed, 1])

    def seconds(worker: str) -> float:
        del worker
        return float(random.exponential(scenario.join_s)) if scenario.join_s else 0.0

    return seconds


def _crashes(scenario: Scenario) -> FaultPlan:
    """Return the plan of the workers' crashes."""
    random = np.random.default_rng([scenario.seed, 2])
    crash_s = scenario.crash_s
    return FaultPlan() if crash_s is None else Crashes(lambda: float(random.exponential(crash_s)), scenario.seed)


def simulate(
    name: str, spec: JobSpec, workload: Workload, scenario: Scenario, target: SimulationTarget | None
) -> SimulationResult:
    """Run one job to its end, or to the target.

    Args:
        name: name of the job in the results.
        spec: the job, as returned by `jobs_to_simulate`.
        workload: training problem and metric.
        scenario: the simulated workers.
        target: value of the metric at which to stop. None: run to the end of the job.
    """
    problem = workload.problem()
    mean_s = _mean_s(scenario)
    curve = _Curve(workload, target, every=max(1, _expected_updates(spec, problem) // POINTS))
    counter = _GradientCounter()
    run = VirtualCluster(
        spec,
        problem,
        _compute_s(scenario),
        timing=Timing(CALL * mean_s, scenario.link_s, 0.0, POLL * mean_s, CALL * mean_s, mean_s),
        start_s=_joins(scenario),
        faults=_crashes(scenario),
        lease_s=LEASE * mean_s,
        observers=[curve, counter],
    ).run()
    counter.journalled(run, 0, run.servers[0].journal.take())
    report = run.servers[0].report()
    began = run.status.began or 0.0
    ended = report.last.now if report.last else run.now
    curve.measure(run, ended)
    assert run.finish
    duration_s = ended - began
    total = counter.counts.total()
    return SimulationResult(
        name=name,
        status=run.finish.status if run.finish.error is None else f"{run.finish.status}: {run.finish.error}",
        metric=workload.metric,
        value=curve.points[-1].value,
        time_s=duration_s,
        updates=report.version.updates,
        examples=report.samples,
        updates_per_s=report.version.updates / duration_s if duration_s > 0 else 0.0,
        examples_per_s=report.samples / duration_s if duration_s > 0 else 0.0,
        time_to_target_s=curve.reached.time_s if curve.reached else None,
        examples_to_target=curve.reached.examples if curve.reached else None,
        pushes=dict(report.pushes),
        staleness=staleness_summary(report.staleness),
        staleness_counts=dict(sorted(report.staleness.items())),
        shares={worker.decode(): count / total for worker, count in sorted(counter.counts.items(), key=_worker_number)},
        crashes=run.status.charged_failures,
        curve=tuple(curve.points),
    )


def _worker_number(item: tuple[bytes, int]) -> int:
    return int(item[0].removeprefix(b"worker-"))


def _expected_updates(spec: JobSpec, problem: Problem) -> int:
    """Return the approximate number of updates of a whole run."""
    batches = (spec.run.epochs or 1) * problem.grid.num_batches
    per_update = build_consistency(spec.consistency).batches_per_update(spec.scaling.most_workers)
    return min(spec.run.max_updates or batches, batches // per_update)


def _mean_s(scenario: Scenario) -> float:
    """Return the mean virtual time of a gradient, from about 100 draws."""
    sources = [scenario.delays.source(worker, scenario.workers, scenario.seed) for worker in range(scenario.workers)]
    draws = max(1, 100 // scenario.workers)
    return float(np.mean([source() for source in sources for _ in range(draws)]))


def _compute_s(scenario: Scenario) -> Callable[[str, BatchId], float]:
    """Return a function (worker, batch) -> virtual seconds of the gradient.

    Each worker draws from its own sequence. The successor of a dead worker has a new number and a new sequence.
    """
    sources: dict[str, Callable[[], float]] = {}

    def seconds(worker: str, batch: BatchId) -> float:
        del batch
        source = sources.get(worker)
        if source is None:
            generation, index = divmod(int(worker.removeprefix("worker-")), scenario.workers)
            source = sources[worker] = scenario.delays.source(index, scenario.workers, scenario.seed + generation)
        return source()

    return seconds


class _Curve(ClusterObserver):
    """Measures the metric at intervals, and ends the run once the target is reached.

    Attributes:
        points: the measurements, in order.
        reached: first measurement that reaches the target, or None.
    """

    def __init__(self, workload: Workload, target: SimulationTarget | None, every: int) -> None:
        self._workload = workload
        self._target = target
        self._every = every
        self._next = 0  # number of updates at which the next point is due
        self._began = 0.0
        self.points: list[Point] = []
        self.reached: Point | None = None

    def stepped(self, cluster: VirtualCluster) -> None:
        """Measure the metric if a point is due, or if measuring is cheap and there is a target."""
        due = cluster.servers[0].updates >= self._next
        if not self.reached and (due or (self._target and self._workload.cheap)):
            self.measure(cluster, cluster.now, keep=due)

    def measure(self, cluster: VirtualCluster, now: float, keep: bool = True) -> None:
        """Measure the metric, and end the run if the target is reached.

        Args:
            cluster: the cluster.
            now: virtual time of the measurement.
            keep: True to add a point even if the target is not reached.
        """
        server = cluster.servers[0]
        value = self._workload.measure(cluster)
        self._began = self._began or cluster.status.began or 0.0
        point = Point(now - self._began, server.samples, value)
        reaches = bool(self._target and not self.reached and self._target.reached(value))
        if reaches:
            self.reached = point
            cluster.stop()
        if reaches or keep:
            updates = server.updates
            self._next = updates + min(self._every, max(1, updates // EARLY_POINTS))
            self.points.append(point)


ROW_NAMES = (
    "metric at the end",
    "time, s",
    "updates",
    "examples",
    "examples/s",
    "to target, s",
    "to target, examples",
    "staleness, mean",
    "p95",
    "refused",
)


def row_values(result: SimulationResult) -> list[object]:
    """Return the values of one result, in the order of `ROW_NAMES`."""
    refused = sum(result.pushes[outcome] for outcome in ("requeued", "discarded", "rejected"))
    return [
        result.value,
        result.time_s,
        result.updates,
        result.examples,
        result.examples_per_s,
        "" if result.time_to_target_s is None else result.time_to_target_s,
        "" if result.examples_to_target is None else result.examples_to_target,
        result.staleness["mean"] if result.staleness["mean"] is not None else "",
        result.staleness["p95"] if result.staleness["p95"] is not None else "",
        refused,
    ]
