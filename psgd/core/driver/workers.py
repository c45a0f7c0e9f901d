"""The workers of a run: the leases of each, its speed, and the time of its last sign of life."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from math import inf, sqrt
from typing import Literal

from psgd.core.driver.status import WorkerPhase, WorkerStatus
from psgd.core.server.report import Report
from psgd.spec import FailureConfig

__all__ = ["WorkerRecord", "WorkerTable"]

LEASE_S = 2.0  # seconds of work in a lease: long compared with a call (1 ms), short enough to repeat after a death
LEAST_LEASE_S = 0.03  # least seconds of work in a lease: a change to the next lease takes a worker some ms
FIRST_LEASE = 16  # batches in a lease of a worker whose speed is unknown
AHEAD = 2  # largest number of leases of a worker: the one at work and one queued
SILENCE_FACTOR = 20  # a worker is given up if it is silent for this many times the duration of the longest batch
EVALUATION_FACTOR = 10  # an evaluation may take this many times `failure.timeout_s`
LEAST_BATCH_S = 1e-6  # least measured seconds per batch: a clock may stand still
LEAST_SILENCE_TIMEOUT_S = 5.0  # seconds of silence before any worker is given up; reports come a few times a second


@dataclass(slots=True)
class WorkerRecord:
    """One worker process, from its start to its end. Times are in seconds of the host's clock."""

    name: str
    slot: int  # number from 0 that its successor inherits
    alive_at: float  # time of its last sign of life: its start, a push, or the beginning or end of a lease
    up: bool = False  # True once its process has started
    joined: bool = False  # True if the servers count it as live
    leases: dict[int, int] = field(default_factory=dict)  # id -> number of batches, in order of work
    lease_began: float = 0.0  # time at which the lease at work began
    short_at: float = -inf  # estimated time at which half of the shortest lease is left to do; -inf: unknown
    evaluations: list[int | None] = field(default_factory=list)  # names of the weights that it evaluates
    batch_s: float | None = None  # smoothed seconds per batch
    pushes: dict[int, int] = field(default_factory=dict)  # partition -> number of its pushes, in the newest report
    residual_norm: float = 0.0  # norm of the values that compression left out of its pushes, at its newest lease's end
    lane_failures: int = 0  # number of lane failures in a row
    called_off: int = -1  # newest cancelled lease; it and older ones may end early
    draining: bool = False  # True if it will be stopped as soon as it is not busy

    @property
    def at_work(self) -> bool:
        """Return True if it computes a lease and nothing else: only its pushes show that it is alive."""
        return self.up and bool(self.leases) and not self.evaluations

    @property
    def busy(self) -> bool:
        """Return True if it has a lease or an evaluation."""
        return bool(self.leases or self.evaluations)


@dataclass(slots=True)
class _Sums:
    """Sums over workers, kept up to date, so that a lease takes as long for a thousand workers as for two."""

    measured: int = 0  # number of workers of known speed
    speed: float = 0.0  # of these workers, in batches per second
    batches: int = 0  # leased to all workers
    speed_at_work: float = 0.0  # of those workers of known speed that have a lease
    began: float = 0.0  # over the same workers: speed times the time at which the lease at work began

    def add(self, worker: WorkerRecord, sign: Literal[-1, 1]) -> None:
        """Add a worker with its present values, or subtract it before they change."""
        self.batches += sign * sum(worker.leases.values())
        if worker.batch_s is None:
            return
        speed = sign / worker.batch_s
        self.measured += sign
        self.speed += speed
        if worker.leases:
            self.speed_at_work += speed
            self.began += speed * worker.lease_began


class WorkerTable:
    """All workers of a run.

    Args:
        slots: largest number of workers.
        least: least number of workers with which training begins; None: all.
        lease_s: seconds of work in a lease.

    Attributes:
        target: number of workers that there should be.
        least: least number of workers with which training begins.
        up: workers that have started, in the order of their slots.
        draining: workers that will be stopped as soon as they have no lease and no evaluation.
        below_quota: name -> worker, of the workers that can be given another lease.
    """

    def __init__(self, slots: int, least: int | None = None, lease_s: float = LEASE_S) -> None:
        self._slots = self.target = slots
        self.least = slots if least is None else least
        self._lease_s = lease_s
        self._next_number = 0  # in the name of the next worker
        self._workers: dict[str, WorkerRecord] = {}  # in the order of their slots
        self._longest_s = 0.0  # longest computing time of a batch so far, of any worker
        self._sums = _Sums()
        self._removed_residual_sq = 0.0  # sum of the squared residual norms of the removed workers
        self.up: list[WorkerRecord] = []
        self.draining: list[WorkerRecord] = []
        self.below_quota: dict[str, WorkerRecord] = {}

    def __getitem__(self, name: str) -> WorkerRecord:
        return self._workers[name]

    def __contains__(self, name: str) -> bool:
        return name in self._workers

    def __iter__(self) -> Iterator[WorkerRecord]:
        """Iterate over the workers in the order of their slots."""
        return iter(self._workers.values())

    @property
    def complete(self) -> bool:
        """Return True if the least number of workers is up, or the target if that is lower."""
        return len(self.up) >= min(self.least, self.target)

    def hire(self, wanted: int, now: float) -> list[WorkerRecord]:
        """Add and return records for free slots until there are `wanted` workers."""
        if len(self._workers) >= wanted:
            return []
        taken = {worker.slot for worker in self._workers.values()}
        free = [slot for slot in range(wanted) if slot not in taken][: wanted - len(taken)]
        hired = [WorkerRecord(f"worker-{self._next_number + i}", slot, now) for i, slot in enumerate(free)]
        self._next_number += len(hired)
        records = sorted([*self._workers.values(), *hired], key=lambda worker: worker.slot)
        self._workers = {worker.name: worker for worker in records}
        return hired

    def mark_up(self, name: str, now: float) -> None:
        """Note that a worker has started."""
        worker = self._workers[name]
        worker.up = True
        worker.alive_at = now
        self._update_views()

    def remove(self, name: str) -> WorkerRecord:
        """Remove and return a worker's record."""
        worker = self._workers.pop(name)
        self._sums.add(worker, -1)
        self._removed_residual_sq += worker.residual_norm**2
        self._update_views()
        return worker

    def _update_views(self) -> None:
        self.up = [worker for worker in self._workers.values() if worker.up]
        self.draining = [worker for worker in self._workers.values() if worker.draining]
        self.below_quota = {worker.name: worker for worker in self.up if self._takes_more(worker)}

    @staticmethod
    def _takes_more(worker: WorkerRecord) -> bool:
        return worker.up and not worker.draining and len(worker.leases) < AHEAD

    def surplus(self) -> list[WorkerRecord]:
        """Mark the workers beyond the target as draining and return them.

        Workers that are not up are marked first, then those with the highest slots.
        """
        if len(self._workers) - len(self.draining) <= self.target:
            return []
        staying = [worker for worker in self._workers.values() if not worker.draining]
        staying.sort(key=lambda worker: (worker.up, -worker.slot))
        leaving = staying[: len(staying) - self.target]
        for worker in leaving:
            worker.draining = True
        self._update_views()
        return leaving

    def granted(self, worker: WorkerRecord, lease: int, batches: int, now: float) -> None:
        """Note that a worker was given a lease."""
        self._sums.add(worker, -1)
        if not worker.busy:
            worker.lease_began = worker.alive_at = now
        worker.leases[lease] = batches
        self._add(worker)
        if len(worker.leases) >= AHEAD:
            self.below_quota.pop(worker.name, None)

    def turn_to_lease(self, worker: WorkerRecord, now: float) -> None:
        """Note that a worker has done something else, and now begins or continues its lease."""
        self._sums.add(worker, -1)
        worker.lease_began = worker.alive_at = now
        self._add(worker)

    def closed(self, worker: WorkerRecord, lease: int, now: float, whole: bool = True) -> None:
        """Note that a worker's lease has ended.

        Args:
            worker: the worker.
            lease: id of the lease.
            now: time of the host's clock, in seconds.
            whole: True if the worker has done the whole lease, so that the duration measures its speed.
        """
        self._sums.add(worker, -1)
        batches = worker.leases.pop(lease)
        if whole:
            measured = max(LEAST_BATCH_S, (now - worker.lease_began) / batches)
            worker.batch_s = measured if worker.batch_s is None else 0.5 * (worker.batch_s + measured)
        worker.lease_began = worker.alive_at = now
        self._add(worker)
        if self._takes_more(worker):
            self.below_quota[worker.name] = worker

    def _add(self, worker: WorkerRecord) -> None:
        """Add a worker to the sums again, after its leases or its speed have changed."""
        self._sums.add(worker, 1)
        worker.short_at = -inf
        if worker.leases and worker.batch_s is not None:
            batches = sum(worker.leases.values()) - self.least_lease_size(worker) / 2
            worker.short_at = worker.lease_began + batches * worker.batch_s

    @property
    def _num_sharing(self) -> int:
        """Return the number of workers that share the work.

        Workers that have not started yet count too: the first worker up must leave them a share.
        """
        return max(len(self.up), min(self.least, self.target))

    def part(self, worker: WorkerRecord) -> float:
        """Return the fraction of all work that a worker does while all workers are busy.

        Workers whose speed is unknown count with the mean speed of the others.
        """
        workers = self._num_sharing
        if workers == 1 or worker.batch_s is None:
            return 1 / workers
        return self._sums.measured / (self._sums.speed * worker.batch_s * workers)

    def share_s(self, batches: float) -> float:
        """Return the seconds that each worker of known speed takes for its part of some batches; inf: unknown.

        As parts are in proportion to speeds, the time is the same for all of these workers.
        """
        sums = self._sums
        workers = self._num_sharing
        return inf if workers == 1 or not sums.measured else sums.measured * batches / (sums.speed * workers)

    def unfinished(self, worker: WorkerRecord, now: float) -> float:
        """Return the number of leased batches that a worker still has to do, estimated from its speed."""
        batches = sum(worker.leases.values())
        done = 0.0 if worker.batch_s is None or not batches else (now - worker.lease_began) / worker.batch_s
        return max(0.0, batches - done)

    def all_unfinished(self, now: float) -> float:
        """Return an estimate of the leased batches that all workers together still have to do.

        It takes as long for a thousand workers as for two. A worker that is overdue counts as ahead of its lease, which
        makes the estimate lower than the sum of `unfinished`.
        """
        sums = self._sums
        return max(0.0, sums.batches - (now * sums.speed_at_work - sums.began))

    def silence_timeout_s(self, worker: WorkerRecord, at_most: float) -> float:
        """Return the seconds of silence after which a worker at a lease is given up.

        They are a multiple of the longest computing time of a batch, over all workers. They are `at_most` if that is
        less, or if this worker has not pushed yet.

        Args:
            worker: the worker.
            at_most: upper limit, in seconds.
        """
        if not any(worker.pushes.values()):
            return at_most
        return min(at_most, max(LEAST_SILENCE_TIMEOUT_S, SILENCE_FACTOR * self._longest_s))

    def silence_deadline(self, worker: WorkerRecord, limits: FailureConfig, servers_ready: bool) -> float:
        """Return the time at which a worker is given up if it shows no sign of life; infinity for no limit.

        Args:
            worker: the worker.
            limits: the job's `failure` section.
            servers_ready: False while a server is restored, when workers cannot push.
        """
        if not worker.up:  # a worker beyond the least number may wait for a node without limit
            optional = self.complete and self.least < self.target
            return inf if optional else worker.alive_at + limits.start_timeout_s + limits.timeout_s
        if worker.evaluations:
            return worker.alive_at + EVALUATION_FACTOR * limits.timeout_s
        if not worker.leases or not servers_ready:
            return inf
        return worker.alive_at + self.silence_timeout_s(worker, limits.timeout_s)

    def excuse(self, paused_s: float, now: float) -> None:
        """Do not count `paused_s` seconds as silence of any worker, because the driver was paused and heard nothing."""
        for worker in self._workers.values():
            worker.alive_at = min(now, worker.alive_at + paused_s)

    def lease_size(self, worker: WorkerRecord) -> int:
        """Return the number of batches that take about `lease_s`."""
        return FIRST_LEASE if worker.batch_s is None else max(1, round(self._lease_s / worker.batch_s))

    def least_lease_size(self, worker: WorkerRecord) -> int:
        """Return the least number of batches in a lease that is not the last one of an epoch."""
        return 1 if worker.batch_s is None else max(1, round(LEAST_LEASE_S / worker.batch_s))

    def home(self, worker: WorkerRecord) -> Fraction:
        """Return where a worker's own part of the data begins, as a fraction of all shards."""
        return Fraction(worker.slot % self._slots, self._slots)

    def status(self, parked: Collection[str], now: float) -> tuple[WorkerStatus, ...]:
        """Return the status of every worker, in the order of their slots.

        Args:
            parked: names of workers whose receipt is held back.
            now: time of the host's clock, in seconds.
        """
        return tuple(
            WorkerStatus(
                worker.name,
                _phase(worker, parked),
                worker.joined,
                pushes=max(worker.pushes.values(), default=0),
                leases=len(worker.leases),
                leased=sum(worker.leases.values()),
                batch_s=worker.batch_s,
                silent_s=now - worker.alive_at,
            )
            for worker in self
        )

    @property
    def residual_norm(self) -> float:
        """Return the norm of the values that compression left out of all workers' pushes, removed workers included."""
        return sqrt(self._removed_residual_sq + sum(worker.residual_norm**2 for worker in self._workers.values()))

    def take_report(self, report: Report, now: float) -> None:
        """Note the workers that have pushed since the last report or wait for a receipt: they are alive."""
        self._longest_s = max(self._longest_s, report.longest_s)
        for name, pushes in report.worker_pushes.items():
            worker = self._workers.get(name)
            if worker and (pushes != worker.pushes.get(report.partition, 0) or name in report.parked):
                worker.pushes[report.partition] = pushes
                worker.alive_at = now


def _phase(worker: WorkerRecord, parked: Collection[str]) -> WorkerPhase:
    if not worker.up:
        return "starting"
    if worker.draining:
        return "leaving"
    if worker.leases:
        return "waiting" if worker.name in parked else "working"
    return "evaluating" if worker.evaluations else "idle"
