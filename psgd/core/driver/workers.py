"""The roster: the workers of a run, what each has on lease, and how fast and how alive it is."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from math import inf, sqrt

from psgd.core.driver.status import WorkerPhase, WorkerStatus
from psgd.core.server.report import Report
from psgd.spec import FailureConfig

__all__ = ["WorkerRecord", "WorkerTable"]

LEASE_S = 2.0  # seconds of work in a lease: long against a call (1 ms), short against a death
LEAST_LEASE_S = 0.03  # ... and the least, where batches are short: to turn to the next lease takes a worker some ms
FIRST_LEASE = 16  # batches, while nothing was measured
AHEAD = 2  # leases that a worker has at most: the one at work and one queued
SILENCE_FACTOR = 20  # batches' times without a sign of life before a worker is given up ...
EVALUATION_FACTOR = 10  # an evaluation may take this many times `failure.timeout_s`
LEAST_BATCH_S = 1e-6  # a clock may stand still
LEAST_SILENCE_TIMEOUT_S = 5.0  # ... but never sooner: reports tell of pushes a few times a second


@dataclass(slots=True)
class WorkerRecord:
    """One worker process, from its start to its end."""

    name: str
    slot: int  # 0 ... workers - 1; its successor gets the same
    alive_at: float  # when it last showed life: its start, a push, a lease's begin or end
    up: bool = False
    joined: bool = False  # counted as live by the servers
    leases: dict[int, int] = field(default_factory=dict)  # id -> batches, in order of work
    lease_began: float = 0.0
    evaluations: list[int | None] = field(default_factory=list)
    batch_s: float | None = None  # smoothed seconds per batch
    heard: dict[int, int] = field(default_factory=dict)  # partition -> pushes, when it last reported: they may differ
    residual_norm: float = 0.0  # of what compression has left out of its pushes, when last told
    lane_failures: int = 0  # since its last lease that went well
    called_off: int = -1  # leases up to this one end before all their batches are done
    draining: bool = False  # to be stopped once it has no lease

    @property
    def at_work(self) -> bool:
        """Whether its pushes are its signs of life."""
        return self.up and bool(self.leases) and not self.evaluations

    @property
    def busy(self) -> bool:
        return bool(self.leases or self.evaluations)


class WorkerTable:
    """All workers of a run.

    Args:
        slots: how many workers there may be.
        least: how many there must be to begin.
        lease_s: seconds of work in a lease.

    Attributes:
        target: how many workers there should be.
        least: how many there must be to begin.
        up: the workers that are up, in the order of their slots.
        draining: those that are to be stopped once they have nothing to do.
        hungry: likewise, those of them that have less than two leases: the one at work and one queued.
    """

    def __init__(self, slots: int, least: int | None = None, lease_s: float = LEASE_S) -> None:
        self._slots = self.target = slots
        self.least = slots if least is None else least
        self._lease_s = lease_s
        self._named = 0
        self._workers: dict[str, WorkerRecord] = {}  # in the order of their slots
        self._longest_s = 0.0  # that a batch has taken
        self._lost_residual = 0.0  # squared norm, of those that are gone
        self.up: list[WorkerRecord] = []
        self.draining: list[WorkerRecord] = []
        self.below_quota: dict[str, WorkerRecord] = {}

    def __getitem__(self, name: str) -> WorkerRecord:
        return self._workers[name]

    def __contains__(self, name: str) -> bool:
        return name in self._workers

    def __iter__(self) -> Iterator[WorkerRecord]:
        """In the order of their slots."""
        return iter(self._workers.values())

    @property
    def complete(self) -> bool:
        """Whether as many workers are up as there must be, or as there are to be now."""
        return len(self.up) >= min(self.least, self.target)

    def hire(self, wanted: int, now: float) -> list[WorkerRecord]:
        """New records for the slots below `wanted` that have none."""
        if len(self._workers) >= wanted:
            return []
        taken = {worker.slot for worker in self._workers.values()}
        free = [slot for slot in range(wanted) if slot not in taken][: wanted - len(taken)]
        hired = [WorkerRecord(f"worker-{self._named + i}", slot, now) for i, slot in enumerate(free)]
        self._named += len(hired)
        everybody = sorted([*self._workers.values(), *hired], key=lambda worker: worker.slot)
        self._workers = {worker.name: worker for worker in everybody}
        return hired

    def mark_up(self, name: str, now: float) -> None:
        """A worker is up."""
        worker = self._workers[name]
        worker.up = True
        worker.alive_at = now
        self._count()

    def remove(self, name: str) -> WorkerRecord:
        worker = self._workers.pop(name)
        self._lost_residual += worker.residual_norm**2
        self._count()
        return worker

    def _count(self) -> None:
        self.up = [worker for worker in self._workers.values() if worker.up]
        self.draining = [worker for worker in self._workers.values() if worker.draining]
        self.below_quota = {worker.name: worker for worker in self.up if self._takes_more(worker)}

    @staticmethod
    def _takes_more(worker: WorkerRecord) -> bool:
        return worker.up and not worker.draining and len(worker.leases) < AHEAD

    def surplus(self) -> list[WorkerRecord]:
        """Workers beyond the target, which are given no more leases: those that are not up, then the highest slots."""
        if len(self._workers) - len(self.draining) <= self.target:
            return []
        staying = [worker for worker in self._workers.values() if not worker.draining]
        staying.sort(key=lambda worker: (worker.up, -worker.slot))
        leaving = staying[: len(staying) - self.target]
        for worker in leaving:
            worker.draining = True
        self._count()
        return leaving

    def granted(self, worker: WorkerRecord, lease: int, batches: int, now: float) -> None:
        """A worker got a lease."""
        if not worker.busy:
            worker.lease_began = worker.alive_at = now
        worker.leases[lease] = batches
        if len(worker.leases) >= AHEAD:
            self.below_quota.pop(worker.name, None)

    def closed(self, worker: WorkerRecord, lease: int, now: float, whole: bool = True) -> None:
        """A lease ended; what it took per batch is learned, if the worker did the `whole` of it."""
        batches = worker.leases.pop(lease)
        if whole:
            measured = max(LEAST_BATCH_S, (now - worker.lease_began) / batches)
            worker.batch_s = measured if worker.batch_s is None else 0.5 * (worker.batch_s + measured)
        worker.lease_began = worker.alive_at = now
        if self._takes_more(worker):
            self.below_quota[worker.name] = worker

    def silence_timeout_s(self, worker: WorkerRecord, at_most: float) -> float:
        """How long a worker at a lease may show no life: so many times the longest batch of anybody's until now.

        Before the worker's own first push, and in any case, `at_most`.
        """
        if not any(worker.heard.values()):
            return at_most
        return min(at_most, max(LEAST_SILENCE_TIMEOUT_S, SILENCE_FACTOR * self._longest_s))

    def silence_deadline(self, worker: WorkerRecord, limits: FailureConfig, servers_ready: bool) -> float:
        """When a worker that shows no life is given up. While a server is restored, nobody at a lease is."""
        if not worker.up:  # one beyond those there must be may wait for a node for ever
            optional = self.complete and self.least < self.target
            return inf if optional else worker.alive_at + limits.start_timeout_s + limits.timeout_s
        if worker.evaluations:
            return worker.alive_at + EVALUATION_FACTOR * limits.timeout_s
        if not worker.leases or not servers_ready:
            return inf
        return worker.alive_at + self.silence_timeout_s(worker, limits.timeout_s)

    def lease_size(self, worker: WorkerRecord) -> int:
        """Batches that take about as long as a lease should."""
        return FIRST_LEASE if worker.batch_s is None else max(1, round(self._lease_s / worker.batch_s))

    def least_lease_size(self, worker: WorkerRecord) -> int:
        """Batches that a lease should have where there are so many."""
        return 1 if worker.batch_s is None else max(1, round(LEAST_LEASE_S / worker.batch_s))

    def home(self, worker: WorkerRecord) -> Fraction:
        """Where the worker's own part of the shards begins, as a share of all."""
        return Fraction(worker.slot % self._slots, self._slots)

    def status(self, parked: Collection[str], now: float) -> tuple[WorkerStatus, ...]:
        """Describe every worker, in the order of their slots.

        Args:
            parked: names of workers whose receipt is held back.
            now: seconds.
        """
        return tuple(
            WorkerStatus(
                worker.name,
                _phase(worker, parked),
                worker.joined,
                pushes=max(worker.heard.values(), default=0),
                leases=len(worker.leases),
                leased=sum(worker.leases.values()),
                batch_s=worker.batch_s,
                silent_s=now - worker.alive_at,
            )
            for worker in self
        )

    @property
    def residual_norm(self) -> float:
        """Of what compression has left out and no later push has brought: the living workers' and the dead ones'."""
        return sqrt(self._lost_residual + sum(worker.residual_norm**2 for worker in self._workers.values()))

    def heard(self, report: Report, now: float) -> None:
        """Note who pushed since the last report, and who waits for a receipt: both are alive."""
        self._longest_s = max(self._longest_s, report.longest_s)
        for name, pushes in report.heard.items():
            worker = self._workers.get(name)
            if worker and (pushes != worker.heard.get(report.partition, 0) or name in report.parked):
                worker.heard[report.partition] = pushes
                worker.alive_at = now


def _phase(worker: WorkerRecord, parked: Collection[str]) -> WorkerPhase:
    if not worker.up:
        return "starting"
    if worker.draining:
        return "leaving"
    if worker.leases:
        return "waiting" if worker.name in parked else "working"
    return "evaluating" if worker.evaluations else "idle"
