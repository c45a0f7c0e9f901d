"""Leasing: which worker gets which batches, how many, and when an idle worker takes over from a slow one."""

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

TAKEOVER_S = 1.0  # least work left in a lease that may be shared, in seconds; reports are too rare to measure less
SEARCH_INTERVAL_S = 0.25  # seconds between two searches for such a lease; a search costs 1 ms with 1,000 workers
TAKEOVER_FACTOR = 4  # least work left in such a lease, in batch times of the idle worker; the larger limit counts

SHARE_FACTOR = 0.5  # part of its share that a worker gets at once; the rest goes to those that turn out to be faster


class Leasing:
    """Leases the ledger's batches to the workers.

    Args:
        spec: the job.
        ledger: record of the epoch's batches.
        worker_table: the workers.
        servers: newest report of each server.
        limits: limits of the run.
    """

    def __init__(
        self, spec: JobSpec, ledger: Ledger, worker_table: WorkerTable, servers: ServerReports, limits: Limits
    ) -> None:
        self._most_workers = spec.scaling.most_workers
        self._ledger = ledger
        self._worker_table = worker_table
        self._servers = servers
        self._limits = limits
        self._held: dict[str, int] = {}  # name of a worker -> lease during which a server did not answer this worker
        self._slow: dict[str, WorkerRecord] = {}  # name -> worker whose leases were shared
        self._next_search_at = 0.0  # time of the next search for a lease to share
        self._actions: list[Action] = []
        self.change(spec.consistency)

    def change(self, consistency: ConsistencySpec) -> None:
        """Continue in another consistency mode."""
        self._mode = build_consistency(consistency)

    @property
    def in_lockstep(self) -> bool:
        """Return True if leases are striped over all workers."""
        return self._mode.in_lockstep(self._most_workers)

    def hold(self, worker: WorkerRecord, lease: int) -> None:
        """Grant a worker nothing until every server has reported, as a server did not answer it during `lease`.

        If the answer was a receipt that a server held back, the worker does not wait for it: with several servers, the
        one that lacks the push may be the one that the others wait for.
        """
        self._held[worker.name] = lease

    @property
    def holds(self) -> bool:
        """Return True if a worker has to wait for reports before its next lease."""
        return any(self._ledger.in_doubt(lease) for lease in self._held.values())

    def lease(self, now: float) -> list[Action]:
        """Lease batches to every worker below its quota. Return the actions."""
        self._actions = []
        self._held = {name: lease for name, lease in self._held.items() if self._ledger.in_doubt(lease)}
        if self.in_lockstep:
            self._lease_rounds(now)
        elif left := self._leasable():
            table = self._worker_table
            # `_size` is 0 for workers with more to do than half of their share and half of the shortest lease. They are
            # left out here, because near an epoch's end nearly all of a thousand workers have that much.
            work = left + table.all_unfinished(now)
            short_by = now + SHARE_FACTOR * table.share_s(work)
            candidates = [worker for worker in table.below_quota.values() if worker.short_at <= short_by]
            for ahead in range(AHEAD):  # idle workers come first, then those without a queued lease
                for worker in [worker for worker in candidates if len(worker.leases) == ahead]:
                    if worker.name not in self._held and (size := self._size(worker, left, work, now)):
                        self._grant(worker, self._ledger.grant(size, table.home(worker)), now)
                        left = self._leasable()
                        work = left + table.all_unfinished(now)
        elif now >= self._next_search_at:
            self._share(now)
        return self._actions

    def call_off(self) -> list[Action]:
        """Cancel shared leases of which every batch is done; the worker ends them after its current batch."""
        actions: list[Action] = []
        for worker in list(self._slow.values()):
            done = list(takewhile(self._ledger.is_done, worker.leases))
            if self._ledger.shared.intersection(done) and done[-1] > worker.called_off:
                worker.called_off = done[-1]
                actions.append(Cancel(worker.name, done[-1]))
            if not self._ledger.shared.intersection(worker.leases):
                del self._slow[worker.name]
        return actions

    def cancel(self, worker: WorkerRecord) -> Cancel:
        """Return the order to end all leases of a worker after its current batch."""
        worker.called_off = self._ledger.newest_lease
        return Cancel(worker.name, worker.called_off)

    def leave_idle(self) -> list[Action]:
        """Return a `Leave` order for each joined worker that has no lease, so that no round waits for it."""
        if self._mode.steps_alone:  # there are no rounds, and to join again would take time
            return []
        idle = [worker for worker in self._worker_table if worker.joined and not worker.leases]
        for worker in idle:
            worker.joined = False
        return [Leave(worker.name) for worker in idle]

    def _share(self, now: float) -> None:
        """Share the longest leases with idle workers, one after the other, while that pays off."""
        for idle in [worker for worker in self._worker_table.below_quota.values() if not worker.leases]:
            if idle.name not in self._held and not self._take_over(idle, now):
                self._next_search_at = now + SEARCH_INTERVAL_S
                break

    def _take_over(self, idle: WorkerRecord, now: float) -> bool:
        """Give an idle worker a part of the lease with the most work left. Return False if no lease is long enough."""
        seconds, lease, slow = self._longest(max(TAKEOVER_S, TAKEOVER_FACTOR * (idle.batch_s or 0)), idle, now)
        if slow is idle:
            return False
        left = self._ledger.left(lease)
        batch_s = seconds / left
        idle_s = idle.batch_s or batch_s  # a new worker is assumed to be as fast
        share = max(1, round(left * batch_s / (batch_s + idle_s)))
        self._grant(idle, self._ledger.take_over(lease, share), now)
        self._slow[slow.name] = slow
        self._actions.append(Note("taken_over", {"worker": slow.name, "by": idle.name, "batches": share}))
        return True

    def _longest(self, least_s: float, default: WorkerRecord, now: float) -> tuple[float, int, WorkerRecord]:
        """Return the seconds left, the lease and the worker of the lease with the most work left.

        The estimate is the worker's seconds per batch times its batches left, or the time since its last sign of life
        if that is longer. To save time, batches left are counted only for leases that may beat the best found so far.

        Args:
            least_s: seconds of work left that a lease must have.
            default: worker to return if no lease has that much.
            now: time of the host's clock, in seconds.
        """
        found = (least_s, -1, default)
        leases = [
            (self._at_most_s(worker, lease, now), lease, worker)
            for worker in self._worker_table.up
            for lease in worker.leases
        ]
        for at_most_s, lease, worker in sorted(leases, key=lambda one: one[:2], reverse=True):
            if at_most_s < found[0]:
                break
            left = self._ledger.left(lease)
            batch_s = worker.batch_s or (now - worker.lease_began) / max(1, worker.leases[lease] - left)
            seconds = max(left * batch_s, now - worker.alive_at)
            if left and seconds >= found[0]:
                found = (seconds, lease, worker)
        return found

    def _at_most_s(self, worker: WorkerRecord, lease: int, now: float) -> float:
        """Return an upper bound on the seconds of work left in a lease."""
        batch_s = worker.batch_s or now - worker.lease_began
        return max(worker.leases[lease] * batch_s, now - worker.alive_at)

    def _leasable(self) -> int:
        """Return the number of batches that can be leased."""
        return min(self._ledger.pending, self._batches_allowed())

    def _size(self, worker: WorkerRecord, left: int, work: float, now: float) -> int:
        """Return the size of a worker's next lease; 0: none for now.

        Leases shrink towards an epoch's end, so that workers end together. A lease takes a worker's unfinished batches
        to half of its share of all unfinished batches, according to its speed; a short last one to all of the share.

        Args:
            worker: the worker.
            left: number of batches that can be leased.
            work: number of batches that can be leased or that a worker still has to do.
            now: time of the host's clock, in seconds.
        """
        table = self._worker_table
        part = table.part(worker)
        if part == 1:
            return min(table.lease_size(worker), left)
        own = table.unfinished(worker, now)
        share = part * work
        least = table.least_lease_size(worker)
        wanted = ceil(SHARE_FACTOR * share - own)
        if wanted < least:
            if own >= least:
                return 0
            wanted = min(least, max(round(share - own), 0 if worker.leases else 1))
        return min(table.lease_size(worker), wanted, left)

    def _batches_allowed(self) -> int:
        """Return the number of batches that may be leased before `run.max_updates` is reached."""
        left = self._limits.updates_left(self._servers.updates)
        if left is None:
            return self._ledger.pending
        per_update = self._mode.batches_per_update(len(self._worker_table.up))
        # The ledger counts the batches of buffered gradients as done, but no update contains them yet.
        buffered = max(report.pushes["buffered"] for report in self._servers.reports.values())
        return max(0, left * per_update - self._ledger.outstanding - buffered)

    def _lease_rounds(self, now: float) -> None:
        """Lease whole blocks of rounds to all workers at once, as soon as no worker has a second block queued."""
        workers = [worker for worker in self._worker_table.up if not worker.draining]
        if not workers or any(len(worker.leases) > 1 or worker.name in self._held for worker in workers):
            return
        if self._ledger.suspects:
            if not any(worker.leases for worker in workers):
                self._grant(workers[0], self._ledger.grant(1), now)
            return
        size = min(self._worker_table.lease_size(worker) for worker in workers)
        rounds = min(size, ceil(self._batches_allowed() / len(workers)))
        leases = self._ledger.grant_striped(len(workers), rounds)
        granted = list(zip(workers, leases, strict=False))  # an epoch's last block may be too small for all
        for worker, _ in granted:
            self._join(worker)  # all workers join before the first one can push
        for worker, lease in granted:
            self._grant(worker, lease, now)

    def _join(self, worker: WorkerRecord) -> None:
        """Tell the servers about a worker before its first lease."""
        if not worker.joined:
            worker.joined = True
            worker.pushes.clear()
            self._actions.append(Join(worker.name))

    def _grant(self, worker: WorkerRecord, lease: Lease | None, now: float) -> None:
        if lease is not None:
            self._join(worker)
            self._worker_table.granted(worker, lease.id, len(lease), now)
            self._actions.append(Grant(worker.name, lease))
