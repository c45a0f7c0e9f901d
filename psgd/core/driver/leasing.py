"""Leasing: who gets which batches now, how many, and when an idle worker takes over from a slow one."""

from __future__ import annotations

from itertools import takewhile
from math import ceil

from psgd.core.driver.events import Action, Cancel, Grant, Join, Leave, Note
from psgd.core.driver.ledger import Ledger
from psgd.core.driver.limits import Limits
from psgd.core.driver.server_reports import ServerReports
from psgd.core.driver.workers import AHEAD, WorkerRecord, WorkerTable
from psgd.core.server.consistency import build_consistency
from psgd.spec import ConsistencySpec, JobSpec
from psgd_workers.messages import Lease

__all__ = ["Leasing"]

TAKEOVER_S = 1.0  # a lease that has so long to go is shared with who is idle; less is not seen through reports
LOOK_S = 0.25  # between two looks for such a lease, which cost a millisecond with a thousand workers
TAKEOVER_FACTOR = 4  # ... and so many batches of the idle worker's


class Leasing:
    """Gives the ledger's batches to the roster's workers.

    Args:
        spec: the job.
        ledger: what is left to do.
        roster: who can do it.
        servers: how far they are.
        limits: how far they are to come.
    """

    def __init__(
        self, spec: JobSpec, ledger: Ledger, worker_table: WorkerTable, servers: ServerReports, limits: Limits
    ) -> None:
        self._most_workers = spec.scaling.most_workers
        self._ledger = ledger
        self._worker_table = worker_table
        self._server_reports = servers
        self._limits = limits
        self._held: dict[str, int] = {}  # worker -> its lease that a server did not answer in
        self._slow: dict[str, WorkerRecord] = {}  # whose leases were shared
        self._look_at = 0.0  # when it may be worth it to share again
        self._actions: list[Action] = []
        self.change(spec.consistency)

    def change(self, consistency: ConsistencySpec) -> None:
        """Go on in another mode."""
        self._mode = build_consistency(consistency)

    @property
    def in_lockstep(self) -> bool:
        """Whether leases are striped over all workers."""
        return self._mode.in_lockstep(self._most_workers)

    def hold(self, worker: WorkerRecord, lease: int) -> None:
        """A server did not answer in that lease: its worker gets nothing until all of them have reported since."""
        self._held[worker.name] = lease

    @property
    def holds(self) -> bool:
        """Whether some worker is held."""
        return any(self._ledger.in_doubt(lease) for lease in self._held.values())

    def lease(self, now: float) -> list[Action]:
        """Give everybody who can take it as much as there is."""
        self._actions = []
        if self.in_lockstep:
            self._lease_rounds(now)
        elif self._left():
            for ahead in range(AHEAD):  # nobody idles before another has a lease queued
                for worker in [
                    worker for worker in self._worker_table.below_quota.values() if len(worker.leases) == ahead
                ]:
                    if not self._is_held(worker) and (left := self._left()):
                        size = self._size(worker, left)
                        self._grant(worker, self._ledger.grant(size, self._worker_table.home(worker)), now)
        elif now >= self._look_at:
            self._share(now)
        return self._actions

    def call_off(self) -> list[Action]:
        """A lease whose last batches others have done by now ends after the batch in hand."""
        actions: list[Action] = []
        for worker in list(self._slow.values()):
            done = list(takewhile(self._ledger.is_done, worker.leases))
            if self._ledger.overtaken.intersection(done) and done[-1] > worker.called_off:
                worker.called_off = done[-1]
                actions.append(Cancel(worker.name, done[-1]))
            if not self._ledger.overtaken.intersection(worker.leases):
                del self._slow[worker.name]
        return actions

    def cancel(self, worker: WorkerRecord) -> Cancel:
        """All leases of a worker end after the batch in hand."""
        worker.called_off = self._ledger.newest_lease
        return Cancel(worker.name, worker.called_off)

    def leave_idle(self) -> list[Action]:
        """A worker without a lease is not live: no round may wait for it."""
        idle = [worker for worker in self._worker_table if worker.joined and not worker.leases]
        for worker in idle:
            worker.joined = False
        return [Leave(worker.name) for worker in idle]

    def _is_held(self, worker: WorkerRecord) -> bool:
        if self._held and not self._ledger.in_doubt(self._held.get(worker.name, -1)):
            self._held.pop(worker.name, None)
        return worker.name in self._held

    def _share(self, now: float) -> None:
        """Share what takes longest with idle workers, one after the other, as long as that is worth it."""
        for idle in [worker for worker in self._worker_table.below_quota.values() if not worker.leases]:
            if not self._is_held(idle) and not self._take_over(idle, now):
                self._look_at = now + LOOK_S
                break

    def _take_over(self, idle: WorkerRecord, now: float) -> bool:
        """Share the lease that has longest to go with an idle worker; whether that is worth it."""
        seconds, lease, slow = self._longest(max(TAKEOVER_S, TAKEOVER_FACTOR * (idle.batch_s or 0)), idle, now)
        if slow is idle:
            return False
        left = self._ledger.left(lease)
        pace = seconds / left
        share = max(1, round(left * pace / (pace + (idle.batch_s or pace))))  # a new worker is taken to be as fast
        self._grant(idle, self._ledger.take_over(lease, share), now)
        self._slow[slow.name] = slow
        self._actions.append(Note("taken_over", {"worker": slow.name, "by": idle.name, "batches": share}))
        return True

    def _longest(self, least_s: float, nobody: WorkerRecord, now: float) -> tuple[float, int, WorkerRecord]:
        """The lease that has longest to go, at least so long, and whose it is; or nobody's.

        That is by its worker's pace until now, and by its silence. What is left of a lease is counted only where the
        whole of it would take longer than what was found.
        """
        found = (least_s, -1, nobody)
        leases = [
            (self._at_most_s(worker, lease, now), lease, worker)
            for worker in self._worker_table.up
            for lease in worker.leases
        ]
        for at_most_s, lease, worker in sorted(leases, key=lambda one: one[:2], reverse=True):
            if at_most_s < found[0]:
                break
            left = self._ledger.left(lease)
            pace = worker.batch_s or (now - worker.lease_began) / max(1, worker.leases[lease] - left)
            seconds = max(left * pace, now - worker.alive_at)
            if left and seconds >= found[0]:
                found = (seconds, lease, worker)
        return found

    def _at_most_s(self, worker: WorkerRecord, lease: int, now: float) -> float:
        pace = worker.batch_s or now - worker.lease_began
        return max(worker.leases[lease] * pace, now - worker.alive_at)

    def _left(self) -> int:
        """Batches that can be leased."""
        return min(self._ledger.pending, self._batches_allowed())

    def _size(self, worker: WorkerRecord, left: int) -> int:
        """Half an even share of what is left: leases shrink towards an end, so that workers end together.

        Those that are still to come up count too: what the first one has on lease, it would keep from them.
        """
        workers = max(len(self._worker_table.up), min(self._worker_table.least, self._worker_table.target))
        share = left if workers <= 1 else ceil(left / (2 * workers))
        return min(self._worker_table.lease_size(worker), max(share, self._worker_table.least_lease_size(worker)), left)

    def _batches_allowed(self) -> int:
        """How many more batches `max_updates` leaves to be leased."""
        left = self._limits.updates_left(self._server_reports.updates)
        if left is None:
            return self._ledger.pending
        per_update = self._mode.batches_per_update(len(self._worker_table.up))
        # Contained, but in no update yet.
        buffered = max(report.pushes["buffered"] for report in self._server_reports.reports.values())
        return max(0, left * per_update - self._ledger.outstanding - buffered)

    def _lease_rounds(self, now: float) -> None:
        """Whole blocks of rounds, to all workers at once, as soon as nobody has a block ahead of its present one."""
        workers = [worker for worker in self._worker_table.up if not worker.draining]
        if not workers or any(len(worker.leases) > 1 or self._is_held(worker) for worker in workers):
            return
        if self._ledger.suspects:
            if not any(worker.leases for worker in workers):
                self._grant(workers[0], self._ledger.grant(1), now)
            return
        size = min(self._worker_table.lease_size(worker) for worker in workers)
        rounds = min(size, ceil(self._batches_allowed() / len(workers)))
        leases = self._ledger.grant_striped(len(workers), rounds)
        granted = list(zip(workers, leases, strict=False))  # an epoch's last block may leave some without
        for worker, _ in granted:
            self._join(worker)  # all of them, before the first can push
        for worker, lease in granted:
            self._grant(worker, lease, now)

    def _join(self, worker: WorkerRecord) -> None:
        if not worker.joined:
            worker.joined = True
            worker.heard.clear()
            self._actions.append(Join(worker.name))

    def _grant(self, worker: WorkerRecord, lease: Lease | None, now: float) -> None:
        if lease is not None:
            self._join(worker)
            self._worker_table.granted(worker, lease.id, len(lease), now)
            self._actions.append(Grant(worker.name, lease))
