"""Simulate: a job, on workers that are not there, on a virtual clock; what it would come to, and how fast."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from psgd.core.server.consistency import build_consistency
from psgd.core.server.observer import ServerObserver
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
from psgd_workers.messages import BatchId, Evaluation, FloatArray, Gradient

__all__ = ["FIGURES", "JobSubject", "Point", "QuadraticSubject", "Simulated", "Subject", "figures", "simulate"]

POINTS = 200  # of a curve, about
EARLY = 16  # points between n and 2n updates, until `POINTS` says more

# What the driver does takes its time next to a gradient's, as in a real run with batches of some tens of milliseconds.
CALL, POLL, LEASE = 0.02, 4.0, 100.0  # of a mean gradient's time


class Point(NamedTuple):
    """A metric at one instant."""

    time_s: float  # virtual, since training began
    examples: int  # applied
    value: float


@dataclass(frozen=True, slots=True)
class Simulated:
    """What one job came to. Every time is in virtual seconds, from the beginning of training."""

    name: str
    status: str
    metric: str
    value: float  # of the metric at the end
    time_s: float
    updates: int
    examples: int  # applied
    updates_per_s: float
    examples_per_s: float
    time_to_target_s: float | None  # None: there is no target, or it was not reached
    examples_to_target: int | None
    pushes: dict[str, int]  # by outcome
    staleness: dict[str, float | None]  # mean, p50, p95, max
    staleness_counts: dict[int, int]
    shares: dict[str, float]  # worker -> its share of the gradients in the weights
    crashes: int
    curve: tuple[Point, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values; curves as lists of [time, examples, value]."""
        return asdict(self) | {"curve": [list(point) for point in self.curve]}


class Subject(Protocol):
    """What is trained, and how well it does."""

    metric: str
    cheap: bool  # whether measuring costs no more than a step: then a target is looked for after every step

    def problem(self) -> Problem:
        """A problem of its own for each run."""

    def measure(self, cluster: VirtualCluster) -> float:
        """The metric now."""


class QuadraticSubject:
    """Pure dynamics.

    Args:
        size: parameters.
        pushes: at the most.
        seed: of the noise.
    """

    metric = "excess"
    cheap = True

    def __init__(self, size: int, pushes: int, seed: int) -> None:
        self._size = size
        self._pushes = pushes
        self._seed = seed
        self._quadratic = Quadratic(size, seed=seed)

    def problem(self) -> Problem:
        """The quadratic from its start, its noise from the seed."""
        self._quadratic = Quadratic(self._size, seed=self._seed)
        return self._quadratic.problem(self._pushes)

    def measure(self, cluster: VirtualCluster) -> float:
        """How far above the minimum the weights are."""
        return self._quadratic.excess(cluster.weights)


class JobSubject:
    """A job's own model and data.

    Args:
        job: the job.
        metric: what is measured; None: the validation loss, or the training loss where there is no validation part.

    Raises:
        SpecError: the data has no such metric.
    """

    cheap = False

    def __init__(self, job: OpenJob, metric: str | None = None) -> None:
        validates = job.dataset.validation is not None
        self.metric = metric or ("val/loss" if validates else "train/loss")
        if self.metric == "excess" or (self.metric.startswith("val/") and not validates):
            raise SpecError(f"--until asks for {self.metric}, which this job does not have")
        if self.metric == "val/accuracy" and job.dataset.classes is None:
            raise SpecError("--until asks for val/accuracy, but the labels are no classes: use val/loss")
        self._job = job
        self._worker = job.worker("simulated")
        self._losses: list[float] = []

    def problem(self) -> Problem:
        """The job's, from its initial weights."""
        job = self._job
        self._losses = []
        shards = job.shards
        return Problem(
            shards.grid,
            job.weights,
            self._gradient,
            job.layout.num_trainable,
            lambda batch: len(shards.rows(batch)),
        )

    def _gradient(self, batch: BatchId, weights: FloatArray, out: FloatArray) -> float:
        loss = self._worker.gradient(batch, weights, out)
        self._losses.append(loss)
        return loss

    def measure(self, cluster: VirtualCluster) -> float:
        """The validation metric, or the mean loss of the batches since the last call."""
        losses, self._losses = self._losses, []
        if self.metric == "train/loss":
            return float(np.mean(losses)) if losses else float("nan")
        assert self._job.dataset.validation is not None
        found: Evaluation = self._worker.evaluate(cluster.weights, self._job.dataset.validation)
        return found.loss if self.metric == "val/loss" else float(found.accuracy or 0)


class _Takers(ServerObserver):
    """Counts whose gradients a server takes.

    Attributes:
        counts: gradients taken, by worker.
    """

    def __init__(self) -> None:
        self.counts = Counter[str]()

    def collected(self, gradient: Gradient) -> None:
        """One more of this worker's."""
        self.counts[gradient.worker] += 1


def _joins(scenario: Scenario) -> Callable[[str], float]:
    """Draw how long each worker takes to join."""
    random = np.random.default_rng([scenario.seed, 1])

    def seconds(worker: str) -> float:
        del worker
        return float(random.exponential(scenario.join_s)) if scenario.join_s else 0.0

    return seconds


def _crashes(scenario: Scenario) -> FaultPlan:
    """Draw when workers crash, and which."""
    random = np.random.default_rng([scenario.seed, 2])
    crash_s = scenario.crash_s
    return FaultPlan() if crash_s is None else Crashes(lambda: float(random.exponential(crash_s)), scenario.seed)


def simulate(
    name: str, spec: JobSpec, subject: Subject, scenario: Scenario, target: SimulationTarget | None
) -> Simulated:
    """Run one job to its end, or to the target.

    Args:
        name: what to call it.
        spec: the job, as `contenders` made it.
        subject: what is trained.
        scenario: the workers.
        target: when to stop.
    """
    problem = subject.problem()
    mean_s = _mean_s(scenario)
    watch = _Watch(subject, target, every=max(1, _updates(spec, problem) // POINTS))
    takers = _Takers()
    run = VirtualCluster(
        spec,
        problem,
        _compute_s(scenario),
        timing=Timing(CALL * mean_s, scenario.link_s, 0.0, POLL * mean_s, CALL * mean_s, mean_s),
        start_s=_joins(scenario),
        faults=_crashes(scenario),
        lease_s=LEASE * mean_s,
        observers=[watch],
        server_observer=lambda partition: None if partition else takers,
    ).run()
    report = run.servers[0].report()
    began = run.status.began or 0.0
    ended = report.last.now if report.last else run.now
    watch.look(run, ended)
    assert run.finish
    took = ended - began
    total = takers.counts.total()
    return Simulated(
        name=name,
        status=run.finish.status if run.finish.error is None else f"{run.finish.status}: {run.finish.error}",
        metric=subject.metric,
        value=watch.curve[-1].value,
        time_s=took,
        updates=report.version.updates,
        examples=report.samples,
        updates_per_s=report.version.updates / took if took > 0 else 0.0,
        examples_per_s=report.samples / took if took > 0 else 0.0,
        time_to_target_s=watch.reached.time_s if watch.reached else None,
        examples_to_target=watch.reached.examples if watch.reached else None,
        pushes=dict(report.pushes),
        staleness=staleness_summary(report.staleness),
        staleness_counts=dict(sorted(report.staleness.items())),
        shares={worker: count / total for worker, count in sorted(takers.counts.items(), key=_number)},
        crashes=run.status.charged_failures,
        curve=tuple(watch.curve),
    )


def _number(item: tuple[str, int]) -> int:
    return int(item[0].removeprefix("worker-"))


def _updates(spec: JobSpec, problem: Problem) -> int:
    """About how many there will be."""
    batches = (spec.run.epochs or 1) * problem.grid.num_batches
    per_update = build_consistency(spec.consistency).batches_per_update(spec.scaling.most_workers)
    return min(spec.run.max_updates or batches, batches // per_update)


def _mean_s(scenario: Scenario) -> float:
    sources = [scenario.delays.source(worker, scenario.workers, scenario.seed) for worker in range(scenario.workers)]
    draws = max(1, 100 // scenario.workers)
    return float(np.mean([source() for source in sources for _ in range(draws)]))


def _compute_s(scenario: Scenario) -> Callable[[str, BatchId], float]:
    """A stream for each worker; the successor of a dead one, which has a new number, begins a new stream."""
    sources: dict[str, Callable[[], float]] = {}

    def seconds(worker: str, batch: BatchId) -> float:
        del batch
        source = sources.get(worker)
        if source is None:
            life, slot = divmod(int(worker.removeprefix("worker-")), scenario.workers)
            source = sources[worker] = scenario.delays.source(slot, scenario.workers, scenario.seed + life)
        return source()

    return seconds


class _Watch(ClusterObserver):
    """Looks at the metric now and then, and ends the run once it is good enough."""

    def __init__(self, subject: Subject, target: SimulationTarget | None, every: int) -> None:
        self._subject = subject
        self._target = target
        self._every = every
        self._next = 0
        self._began = 0.0
        self.curve: list[Point] = []
        self.reached: Point | None = None

    def stepped(self, cluster: VirtualCluster) -> None:
        """Look if it is time to."""
        due = cluster.servers[0].version.updates >= self._next
        if not self.reached and (due or (self._target and self._subject.cheap)):
            self.look(cluster, cluster.now, keep=due)

    def look(self, cluster: VirtualCluster, now: float, keep: bool = True) -> None:
        """Measure, and take a point if it is to be kept or reaches the target."""
        server = cluster.servers[0]
        value = self._subject.measure(cluster)
        self._began = self._began or cluster.status.began or 0.0
        point = Point(now - self._began, server.samples, value)
        reaches = bool(self._target and not self.reached and self._target.reached(value))
        if reaches:
            self.reached = point
            cluster.stop()
        if reaches or keep:
            updates = server.version.updates
            self._next = updates + min(self._every, max(1, updates // EARLY))  # most happens early
            self.curve.append(point)


FIGURES = (
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


def figures(result: Simulated) -> list[object]:
    """What `FIGURES` names, of one result."""
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
