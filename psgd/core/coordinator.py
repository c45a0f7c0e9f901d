"""The coordinator: drives a run's epochs. Events in, actions out; it owns no process, no clock and no disk.

A run starts servers and workers, leases batches until a limit of the job is reached, then ends: leases are cancelled,
doubts settled, the state saved and committed, the last weights evaluated.
"""

from __future__ import annotations

from math import ceil
from typing import Literal

from psgd.core.consistency import build_consistency
from psgd.core.evaluations import Evaluations
from psgd.core.events import (
    Action,
    AskReport,
    Cancel,
    Change,
    ChangeServer,
    Committed,
    Evaluated,
    Event,
    Finish,
    Grant,
    Join,
    LaneFailed,
    LeaseClosed,
    Leave,
    Reported,
    Saved,
    SaveFailed,
    ServerLost,
    Started,
    StartServer,
    StartWorker,
    Stop,
    StopWorker,
    Tick,
    WorkerFailed,
    WorkerLost,
    WorkerUp,
)
from psgd.core.ledger import Ledger
from psgd.core.limits import Limits
from psgd.core.report import Report
from psgd.core.roster import AHEAD, LEASE_S, Roster, WorkerRecord
from psgd.core.saving import Saving
from psgd.result import LedgerCounts, Status
from psgd.spec import JobSpec, Settings
from psgd_workers.messages import EpochGrid, Lease

__all__ = ["Coordinator"]

INTERRUPT_S = 1.0  # for batches in hand after a signal: Ray's job manager kills 3 s after it
EVALUATION_FACTOR = 10  # an evaluation may take this many times `failure.timeout_s`
EVALUATIONS_BEHIND = 2  # open evaluations at which the next epoch waits: servers keep copies of so many epochs


class Coordinator:
    """Decides everything about one run.

    Args:
        spec: the job.
        grid: the shape of an epoch.
        validates: whether there is a validation part.
        checkpoint: the number of the next checkpoint.
        saved_updates: version of the checkpoint the run resumes from; None for a new run.
        saved_epochs: complete epochs in it.
        requeued: batches leased again before this process.
        lease_s: seconds of work in a lease. Longer: fewer calls, and more is done again when a worker dies.
    """

    def __init__(
        self,
        spec: JobSpec,
        grid: EpochGrid,
        *,
        validates: bool,
        checkpoint: int = 0,
        saved_updates: int | None = None,
        saved_epochs: int = 0,
        requeued: int = 0,
        lease_s: float = LEASE_S,
    ) -> None:
        self._spec = spec
        self._grid = grid
        self._partitions = partitions = spec.scaling.servers
        self._limits = Limits(spec.run)
        self._mode = build_consistency(spec.consistency)
        self.phase: Literal["starting", "training", "ending"] = "starting"
        self.ledger = Ledger(grid, partitions)
        self.ledger.requeued = requeued
        self.roster = Roster(spec.scaling.workers, lease_s)
        self.evaluations = Evaluations(self.roster, validates)
        self.saving = Saving(spec.checkpoint, partitions, checkpoint, saved_updates, saved_epochs)
        self.reports: dict[int, Report] = {}
        self.failures = 0
        self.began: float | None = None
        self._asked: dict[int, int] = dict.fromkeys(range(partitions), 0)  # partition -> newest stamp asked
        self._asking: dict[int, int] = dict.fromkeys(range(partitions), 0)  # partition -> stamp of one in flight
        self._polls: dict[int, int] = {}  # partition -> stamp of the report that waits for news
        self._rejected_before: int | None = None
        self._end_status: Status = "finished"
        self._end_deadline = float("inf")
        self._look_at = 0.0  # when the next worker may have to be given up
        self._actions: list[Action] = []
        self._finish: Finish | None = None

    def handle(self, event: Event, now: float) -> tuple[Action, ...]:
        """Take one event.

        Args:
            event: what happened.
            now: the host's clock, in seconds; it never runs backwards.

        Returns:
            What the host is to do, in this order. `Finish` comes alone, and nothing after it.
        """
        if self._finish:
            return ()
        self._actions = []
        self._take(event, now)
        if not self._finish:
            self._decide(now)
        if not self._finish and (self.phase == "ending" or isinstance(event, Reported)):
            self._leave_idle()
        return (self._finish,) if self._finish else tuple(self._actions)

    def next_deadline(self) -> float | None:
        """When the host must send a `Tick`, if nothing happens before; None: never."""
        deadlines = [self._end_deadline, self._look_at]
        if self.phase == "training":
            deadlines += [self._limits.deadline(self.began), self.saving.deadline(self.updates)]
        soonest = min(deadlines)
        return None if soonest == float("inf") else soonest

    def counts(self) -> LedgerCounts:
        """What became of the batches so far."""
        pushes = [report.pushes for report in self.reports.values()]
        return LedgerCounts(
            batches=self.ledger.epoch * self._grid.num_batches + self.ledger.done,
            applied=min((p["applied"] for p in pushes), default=0),
            duplicates=sum(p["duplicate"] for p in pushes),
            requeued=self.ledger.requeued,
            discarded=max((p["discarded"] for p in pushes), default=0),
        )

    @property
    def epochs(self) -> int:
        """Epochs that every partition contains."""
        return min((report.epochs for report in self.reports.values()), default=0)

    @property
    def updates(self) -> int:
        """Steps taken, by the partition that is least far."""
        return min((report.version.updates for report in self.reports.values()), default=0)

    # Events: what they change

    def _take(self, event: Event, now: float) -> None:
        match event:
            case Started():
                for partition in range(self._partitions):
                    self._actions += [StartServer(partition), AskReport(partition, self._stamp(partition), wait=False)]
            case Reported():
                self._on_report(event, now)
            case Stop(status):
                self._end(status, now)
            case Change(settings):
                self._change(settings)
            case ServerLost(partition, cause):
                self._fail(f"server {partition} was lost: {cause}. --resume continues from the newest checkpoint")
            case Saved() | SaveFailed() | Committed():
                self._on_save(event, now)
            case Tick():
                pass  # deciding is all
            case _:
                self._take_from_worker(event, now)

    def _take_from_worker(
        self, event: WorkerUp | LeaseClosed | LaneFailed | WorkerLost | WorkerFailed | Evaluated, now: float
    ) -> None:
        if event.worker not in self.roster:
            return  # it was given up before its answer came
        worker = self.roster[event.worker]
        match event:
            case WorkerUp():
                self.roster.rise(worker.name, now)
            case LeaseClosed(_, lease, residual_norm):
                worker.residual_norm = residual_norm
                self._close(worker, lease, now)
            case LaneFailed(_, lease, cause):
                self._close(worker, lease, now)
                self._charge(f"{worker.name} could not reach its server: {cause}")
            case WorkerLost(_, cause, preempted):
                self._lose(worker, now)
                if not preempted:
                    self._charge(f"{worker.name} was lost: {cause}")
            case WorkerFailed(_, cause):
                self._fail(f"{worker.name}: {cause}")
            case Evaluated(_, epochs, evaluation):
                self.evaluations.done(worker, epochs, evaluation, now)

    def _on_report(self, event: Reported, now: float) -> None:
        report = event.report
        if self._polls.get(report.partition) == event.asked:
            del self._polls[report.partition]
        if self._asking[report.partition] == event.asked:
            self._asking[report.partition] = 0
        known = self.reports.get(report.partition)
        if known and known.moment > report.moment:
            report = known  # overtaken on its way; what was known at its asking is still known
        self.reports[report.partition] = report
        self.ledger.reported(report, event.asked)
        self.roster.heard(report, now)
        self._watch_divergence()

    def _watch_divergence(self) -> None:
        """Count the gradients that were not finite; those before a resumption are past."""
        if len(self.reports) < self._partitions:
            return
        rejected = max(report.pushes["rejected"] for report in self.reports.values())
        if self._rejected_before is None:
            self._rejected_before = rejected
        if rejected - self._rejected_before > self._spec.failure.max_rejected:
            self._fail(
                f"training diverged: {rejected - self._rejected_before} gradients were not finite, and "
                f"failure.max_rejected is {self._spec.failure.max_rejected}. Lower optimizer.lr, or set max_grad_norm"
            )

    def _on_save(self, event: Saved | SaveFailed | Committed, now: float) -> None:
        commit = self.saving.take(event, now)
        if commit:
            self._actions.append(commit)
        if isinstance(event, SaveFailed) and self.phase == "ending":
            self._fail(f"the last checkpoint could not be written: {event.cause}. The one before it stands")

    def _change(self, settings: Settings) -> None:
        self._mode = build_consistency(settings.consistency)
        self._actions += [ChangeServer(partition, settings) for partition in range(self._partitions)]

    def _close(self, worker: WorkerRecord, lease: int, now: float) -> None:
        self.roster.closed(worker, lease, now)
        self.ledger.close(lease)

    def _lose(self, worker: WorkerRecord, now: float) -> None:
        for lease in list(worker.leases):
            self._close(worker, lease, now)
        self.evaluations.lost(worker)
        if worker.joined:
            self._actions.append(Leave(worker.name))
        self.roster.remove(worker.name)

    def _charge(self, cause: str) -> None:
        self.failures += 1
        allowed = self._spec.failure.max_failures
        if 0 <= allowed < self.failures:
            self._fail(f"{cause}. That is failure {self.failures}, and failure.max_failures is {allowed}")

    def _fail(self, cause: str) -> None:
        self._finish = self._finish or Finish("failed", cause)

    # Decisions: what follows from the state

    def _decide(self, now: float) -> None:
        self._give_up_silent(now)
        self._hire(now)
        if self.phase == "starting":
            self._begin(now)
        if self.phase == "training":
            self._turn_epoch()
            self._end_if_due(now)
        if self.phase == "training":
            self._lease(now)
            if self.saving.due(self.updates, now):
                self._actions.append(self.saving.begin(self.updates))
        if self.phase == "ending":
            self._finish_if_done(now)
        self._actions += self.evaluations.assign(now)
        self._ask()

    def _patience(self, worker: WorkerRecord) -> float:
        """When a worker that shows no life is given up."""
        limits = self._spec.failure
        if not worker.up:
            return worker.alive_at + limits.start_timeout_s + limits.timeout_s
        if worker.evaluations:
            return worker.alive_at + EVALUATION_FACTOR * limits.timeout_s
        return worker.alive_at + limits.timeout_s if worker.leases else float("inf")

    def _give_up_silent(self, now: float) -> None:
        if now < self._look_at:
            return
        for worker in list(self.roster):
            if now >= self._patience(worker):
                cause = f"no sign of life for {now - worker.alive_at:.1f} s (see failure.timeout_s)"
                self._actions.append(StopWorker(worker.name, cause))
                self._lose(worker, now)
                self._charge(f"{worker.name}: {cause}")
        # Whoever is granted something from now on is given at least so much patience.
        later = now + self._spec.failure.timeout_s
        self._look_at = min(later, min((self._patience(worker) for worker in self.roster), default=later))

    def _hire(self, now: float) -> None:
        wanted = self._spec.scaling.workers
        if self.phase == "ending":
            wanted = 1 if self.evaluations.waiting and self._end_status != "interrupted" else 0
        self._actions += [StartWorker(worker.name) for worker in self.roster.hire(wanted, now)]

    def _begin(self, now: float) -> None:
        """Train once the servers have reported and a worker is up; lock-step modes wait for all of them."""
        ready = self.roster.complete if self._in_lockstep else bool(self.roster.up)
        if len(self.reports) == self._partitions and ready:
            self.phase = "training"
            self.began = self.saving.closed_at = now
            self._start_epoch()

    def _start_epoch(self) -> None:
        self.ledger.advance(self.epochs)
        for report in self.reports.values():
            self.ledger.reported(report, asked=0)

    def _turn_epoch(self) -> None:
        """Lease the next epoch once this one is complete in every partition."""
        if not self.ledger.complete:
            return
        self.evaluations.want(self.epochs)
        if self.evaluations.open < EVALUATIONS_BEHIND or self._limits.reached(self.epochs, self.updates):
            self._start_epoch()

    def _end_if_due(self, now: float) -> None:
        target = self._limits.target_reached(self.epochs, self.reports.values(), self.evaluations.results.values())
        out_of_time = now >= self._limits.deadline(self.began)
        if target or out_of_time or self._limits.reached(self.epochs, self.updates):
            self._end("finished", now)

    # Leases

    @property
    def _in_lockstep(self) -> bool:
        return self._mode.in_lockstep(self._spec.scaling.workers)

    def _lease(self, now: float) -> None:
        if self._in_lockstep:
            self._lease_rounds(now)
            return
        for ahead in range(AHEAD):  # nobody idles before another has a lease queued
            for worker in [worker for worker in self.roster.hungry.values() if len(worker.leases) == ahead]:
                if not (share := self._fair_share()):
                    return
                size = min(self.roster.lease_size(worker), share)
                self._grant(worker, self.ledger.grant(size, self.roster.home(worker)), now)

    def _fair_share(self) -> int:
        """Half an even share of what is left: leases shrink towards an end, so that workers end together."""
        workers = len(self.roster.up)
        left = min(self.ledger.pending, self._batches_allowed())
        return left if workers == 1 else ceil(left / (2 * workers))

    def _batches_allowed(self) -> int:
        """How many more batches `max_updates` leaves to be leased."""
        left = self._limits.updates_left(self.updates)
        if left is None:
            return self.ledger.pending
        per_update = self._mode.batches_per_update(len(self.roster.up))
        buffered = max(report.pushes["buffered"] for report in self.reports.values())  # contained, but in no update yet
        return max(0, left * per_update - self.ledger.outstanding - buffered)

    def _lease_rounds(self, now: float) -> None:
        """Whole blocks of rounds, to all workers at once, as soon as nobody has a block ahead of its present one."""
        workers = self.roster.up
        if not workers or any(len(worker.leases) > 1 for worker in workers):
            return
        size = min(self.roster.lease_size(worker) for worker in workers)
        rounds = min(size, ceil(self._batches_allowed() / len(workers)))
        leases = self.ledger.grant_striped(len(workers), rounds)
        granted = list(zip(workers, leases, strict=False))  # an epoch's last block may leave some without
        for worker, _ in granted:
            self._join(worker)  # all of them, before the first can push
        for worker, lease in granted:
            self._grant(worker, lease, now)

    def _join(self, worker: WorkerRecord) -> None:
        if not worker.joined:
            worker.joined, worker.heard = True, {}
            self._actions.append(Join(worker.name))

    def _grant(self, worker: WorkerRecord, lease: Lease | None, now: float) -> None:
        if lease is not None:
            self._join(worker)
            self.roster.granted(worker, lease.id, len(lease), now)
            self._actions.append(Grant(worker.name, lease))

    def _leave_idle(self) -> None:
        """A worker without a lease is not live: no round may wait for it."""
        for worker in self.roster:
            if worker.joined and not worker.leases:
                worker.joined = False
                self._actions.append(Leave(worker.name))

    # Reports

    def _ask(self) -> None:
        """Keep one report waiting for news; and when only doubts are left, ask at once, one question at a time."""
        hurry = self.phase == "ending" or not self.ledger.pending
        for partition in self.reports:
            if hurry and not self._asking[partition] and self.ledger.newest_doubt > self._asked[partition]:
                self._asking[partition] = self._stamp(partition)
                self._actions.append(AskReport(partition, self._asking[partition], wait=False))
            if partition not in self._polls:
                self._polls[partition] = self._stamp(partition)
                self._actions.append(AskReport(partition, self._polls[partition], wait=True))

    def _stamp(self, partition: int) -> int:
        self._asked[partition] = self.ledger.ask()
        return self._asked[partition]

    # The end

    def _end(self, status: Status, now: float) -> None:
        """Lease no more; batches in hand are finished. A signal after a limit only adds haste."""
        limit = INTERRUPT_S if status == "interrupted" else self._spec.failure.timeout_s
        self._end_deadline = min(self._end_deadline, now + limit)
        if self.phase != "ending" or status == "interrupted":
            self._end_status = status
        if self.phase != "ending":
            self._actions += [Cancel(worker.name) for worker in self.roster if worker.leases]
        self.phase = "ending"

    def _finish_if_done(self, now: float) -> None:
        if now >= self._end_deadline:
            self._abandon_leases(now)
        if not self.ledger.settled or self.saving.busy:
            return
        if self.reports and (self.saving.lacks(self.updates) or self.saving.saved_epochs < self.epochs):
            self._actions.append(self.saving.begin(self.updates))
            return
        if self._end_status == "interrupted":
            self._finish = Finish(self._end_status)
            return
        self.evaluations.want(self._final_weights())
        if not self.evaluations.open:
            self._finish = Finish(self._end_status)

    def _abandon_leases(self, now: float) -> None:
        self._end_deadline = float("inf")
        for worker in [worker for worker in self.roster if worker.leases]:
            self._actions.append(StopWorker(worker.name, "it did not end its lease in time"))
            self._lose(worker, now)

    def _final_weights(self) -> int | None:
        """The name of the weights that the run ends with: an epoch's last ones, if it ends there."""
        at_an_end = self.epochs > 0 and self.ledger.done == 0
        return self.epochs if at_an_end else None
