"""The roster: the workers of a run, what each has on lease, and how fast and how alive it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from math import sqrt

from psgd.core.report import Report

__all__ = ["Roster", "WorkerRecord"]

LEASE_S = 2.0  # seconds of work in a lease: long against a call (1 ms), short against a death
FIRST_LEASE = 16  # batches, while nothing was measured


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
    heard: int = 0
    residual_norm: float = 0.0  # of what compression has left out of its pushes, when last told

    @property
    def busy(self) -> bool:
        return bool(self.leases or self.evaluations)

    def lease_size(self) -> int:
        """Batches that take about `LEASE_S`."""
        return FIRST_LEASE if self.batch_s is None else max(1, round(LEASE_S / self.batch_s))

    def granted(self, lease: int, batches: int, now: float) -> None:
        if not self.busy:
            self.lease_began = self.alive_at = now
        self.leases[lease] = batches

    def closed(self, lease: int, now: float) -> None:
        """A lease ended; what it took per batch is learned."""
        batches = self.leases.pop(lease)
        measured = (now - self.lease_began) / batches
        self.batch_s = measured if self.batch_s is None else 0.5 * (self.batch_s + measured)
        self.lease_began = self.alive_at = now


class Roster:
    """All workers of a run.

    Args:
        slots: how many workers there should be.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._named = 0
        self._workers: dict[str, WorkerRecord] = {}
        self._lost_residual = 0.0  # squared norm, of those that are gone

    def __getitem__(self, name: str) -> WorkerRecord:
        return self._workers[name]

    def __contains__(self, name: str) -> bool:
        return name in self._workers

    def __iter__(self) -> Iterator[WorkerRecord]:
        """In the order of their slots."""
        return iter(sorted(self._workers.values(), key=lambda worker: worker.slot))

    @property
    def up(self) -> list[WorkerRecord]:
        return [worker for worker in self if worker.up]

    @property
    def complete(self) -> bool:
        """Whether every slot has a worker that is up."""
        return len(self.up) == self._slots

    def hire(self, wanted: int, now: float) -> list[WorkerRecord]:
        """New records for the slots below `wanted` that have none."""
        taken = {worker.slot for worker in self._workers.values()}
        free = [slot for slot in range(min(wanted, self._slots)) if slot not in taken]
        return [self._hire(slot, now) for slot in free]

    def _hire(self, slot: int, now: float) -> WorkerRecord:
        worker = WorkerRecord(f"worker-{self._named}", slot, now)
        self._named += 1
        self._workers[worker.name] = worker
        return worker

    def remove(self, name: str) -> WorkerRecord:
        worker = self._workers.pop(name)
        self._lost_residual += worker.residual_norm**2
        return worker

    @property
    def residual_norm(self) -> float:
        """Of what compression has left out and no later push has brought: the living workers' and the dead ones'."""
        return sqrt(self._lost_residual + sum(worker.residual_norm**2 for worker in self._workers.values()))

    def home(self, worker: WorkerRecord) -> Fraction:
        """Where the worker's own part of the shards begins, as a share of all."""
        return Fraction(worker.slot, self._slots)

    def heard(self, report: Report, now: float) -> None:
        """Note who pushed since the last report, and who waits for a receipt: both are alive."""
        for name, pushes in report.heard.items():
            worker = self._workers.get(name)
            if worker and (pushes != worker.heard or name in report.parked):
                worker.heard, worker.alive_at = pushes, now
