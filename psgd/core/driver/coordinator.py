"""The coordinator: drives a run's epochs. Events in, actions out; it owns no process, no clock and no disk.

A run starts servers and workers and leases batches until a limit of the job is reached. Then it ends: it cancels the
leases, waits until no batch is in doubt, saves and commits the state, and evaluates the final weights.
"""

from __future__ import annotations

from itertools import chain
from math import inf
from typing import Any, Literal

from psgd.core.driver.checkpoint_schedule import CheckpointSchedule
from psgd.core.driver.evaluations import Evaluations
from psgd.core.driver.events import (
    Action,
    Change,
    ChangeServer,
    Committed,
    Evaluated,
    EvaluationLost,
    Event,
    Finish,
    Join,
    LaneFailed,
    LeaseClosed,
    Leave,
    Note,
    Paused,
    Reported,
    Saved,
    SaveFailed,
    Scale,
    ServerLost,
    Started,
    StartWorker,
    Stop,
    StopWorker,
    Tick,
    WorkerFailed,
    WorkerLost,
    WorkerUp,
)
from psgd.core.driver.failures import FailureCounts
from psgd.core.driver.history import History
from psgd.core.driver.leasing import Leasing
from psgd.core.driver.ledger import Ledger
from psgd.core.driver.limits import Limits
from psgd.core.driver.poison import PoisonTracker
from psgd.core.driver.server_reports import ServerReports
from psgd.core.driver.status import RunStatus
from psgd.core.driver.status_reader import StatusReader
from psgd.core.driver.workers import LEASE_S, LEAST_SILENCE_TIMEOUT_S, WorkerRecord, WorkerTable
from psgd.result import Status
from psgd.spec import JobSpec, Settings
from psgd_workers.counting import counted
from psgd_workers.messages import BatchId, EpochGrid

__all__ = ["Coordinator"]

COMPANY_S = 1.0  # seconds that the first worker waits for the others before training begins without them
INTERRUPT_S = 1.0  # seconds to finish current batches after a signal. Ray's job manager kills the driver after 3 s
# The next epoch waits while this many evaluations are open: for each of them, the servers keep a copy of the weights.
EVALUATIONS_BEHIND = 2
LANE_TRIES = 3  # leases in a row without an answer from a server, after which the worker is replaced

WorkerEvent = WorkerUp | LeaseClosed | LaneFailed | WorkerLost | WorkerFailed | Evaluated | EvaluationLost


class Coordinator:
    """Makes every decision of one run.

    Args:
        spec: the job.
        grid: number of batches by shard.
        validates: True if the data has a validation part.
        checkpoint: number of the next checkpoint.
        saved_updates: updates in the checkpoint that the run resumes from; None for a new run.
        saved_epochs: complete epochs in that checkpoint.
        requeued: number of batches that earlier processes of the run leased again.
        lease_s: seconds of work in a lease. Longer: fewer calls, but more batches to repeat when a worker dies.
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
        self._phase: Literal["starting", "training", "ending"] = "starting"
        self._ledger = Ledger(grid, partitions)
        self._ledger.requeued = requeued
        self._servers = ServerReports(partitions, self._ledger.next_stamp)
        self._worker_table = WorkerTable(spec.scaling.most_workers, spec.scaling.least_workers, lease_s)
        self._evaluations = Evaluations(self._worker_table, validates)
        self._checkpoints = CheckpointSchedule(spec.checkpoint, partitions, checkpoint, saved_updates, saved_epochs)
        self._leasing = Leasing(spec, self._ledger, self._worker_table, self._servers, self._limits)
        self._failure_counts = FailureCounts()
        self._history = History()
        self._status_reader = StatusReader(
            grid,
            self._ledger,
            self._servers,
            self._worker_table,
            self._evaluations,
            self._checkpoints,
            self._failure_counts,
            self._history,
        )
        self._poison_tracker = PoisonTracker(grid, spec.failure.poison_tries)
        self._began: float | None = None
        self._rejected_before: int | None = None
        self._company_deadline = inf  # time at which the first worker that is up waits no longer for the others
        self._enough_were_up = False  # True once the least number of workers was up
        self._end_status: Status = "finished"
        self._end_deadline = inf
        self._settings: Settings | None = None  # set by `Change`; None: the job's own
        self._silence_check_at = 0.0  # time of the next search for silent workers
        self._overdue = False  # True if a worker's deadline has passed, but not all servers have reported since
        self._actions: list[Action] = []
        self._finish: Finish | None = None

    def handle(self, event: Event, now: float) -> tuple[Action, ...]:
        """Handle one event.

        Args:
            event: change that the host has observed.
            now: time of the host's clock, in seconds; it never decreases.

        Returns:
            Actions that the host must carry out, in this order. `Finish` comes alone, and no action follows it.
        """
        if self._finish:
            return ()
        self._actions = []
        self._take(event, now)
        if not self._finish:
            self._decide(now)
        if not self._finish and (self._phase == "ending" or isinstance(event, Reported)):
            self._actions += self._leasing.leave_idle()
        return (self._finish,) if self._finish else tuple(self._actions)

    def next_deadline(self) -> float | None:
        """Return the time at which the host must send a `Tick` if no event comes before; None if it need not."""
        deadlines = [self._end_deadline, self._silence_check_at, self._checkpoints.retry_at]
        if self._phase == "starting" and self._servers.ready and not self._waits_for_least:
            deadlines.append(self._company_deadline)
        if self._phase == "training" and self._servers.ready:  # else the next report wakes the host
            deadlines += [
                self._limits.deadline(self._began),
                self._checkpoints.deadline(self._servers.updates),
            ]
        return None if (soonest := min(deadlines)) == inf else soonest

    def status(self, now: float) -> RunStatus:
        """Return the run's status. A call takes a few microseconds for each worker: call it a few times per second."""
        will_validate = self._phase == "ending" and self._end_status != "interrupted" and not self._finish
        to_validate = self._final_weights() if will_validate else None
        return self._status_reader.read(now, "ended" if self._finish else self._phase, self._began, to_validate)

    # Events: the changes that they make

    def _take(self, event: Event, now: float) -> None:
        match event:
            case Started():
                self._actions += chain.from_iterable(map(self._servers.start, range(self._partitions)))
            case Reported():
                self._on_report(event, now)
            case Stop(status):
                self._end(status, now)
            case Change(settings):
                self._change(settings)
            case Scale(workers):
                self._worker_table.target = workers
            case ServerLost():
                self._on_server_lost(event, now)
            case Saved() | SaveFailed() | Committed():
                self._on_save(event, now)
            case Paused(seconds):
                self._worker_table.excuse(seconds, now)
            case Tick():
                pass  # `_decide` does the rest
            case _:
                self._take_from_worker(event, now)

    def _take_from_worker(self, event: WorkerEvent, now: float) -> None:
        if event.worker not in self._worker_table:
            return  # the worker was removed before this event came
        worker = self._worker_table[event.worker]
        match event:
            case WorkerUp():
                self._worker_table.mark_up(worker.name, now)
                self._enough_were_up |= self._worker_table.complete
            case LeaseClosed(_, lease, residual_norm):
                worker.residual_norm = residual_norm
                worker.lane_failures = 0
                self._close(worker, lease, now, whole=lease > worker.called_off and lease not in self._ledger.shared)
            case LaneFailed(_, lease, cause):
                self._on_lane_failed(worker, lease, cause, now)
            case WorkerLost():
                self._on_worker_lost(worker, event, now)
            case WorkerFailed(_, cause):
                self._fail(f"{worker.name}: {cause}")
            case Evaluated(_, epochs, evaluation):
                self._evaluations.done(worker, epochs, evaluation, now)
            case EvaluationLost(_, epochs):
                self._evaluations.evaluation_lost(worker, epochs, now)

    def _on_worker_lost(self, worker: WorkerRecord, event: WorkerLost, now: float) -> None:
        """Remove a worker whose process is gone. Fail the run if one of the first workers could not begin to work."""
        if not event.died and not self._enough_were_up:
            self._fail(
                f"{worker.name} could not begin to work on its machine, although its model was built on the driver's: "
                f"{event.cause}. Install the modules that the model needs on every machine, or send them with the job "
                "(psgd submit --py-module FOLDER)"
            )
            return
        self._remove_worker(worker, now, suspicious=event.died and not event.preempted)
        if event.preempted:
            self._failure_counts.count("preempted")
        else:
            self._charge("worker_lost", f"{worker.name} was lost: {event.cause}")

    def _on_lane_failed(self, worker: WorkerRecord, lease: int, cause: str, now: float) -> None:
        """Close a lease during which a server did not answer the worker.

        If the server is gone, `ServerLost` follows. A worker that fails `LANE_TRIES` times in a row is replaced.
        """
        self._leasing.hold(worker, lease)
        worker.lane_failures += 1
        self._close(worker, lease, now)
        if worker.lane_failures == LANE_TRIES:
            self._actions.append(StopWorker(worker.name, cause))
            self._remove_worker(worker, now)
            self._charge("lane_failed", f"{worker.name} could not reach its server: {cause}")

    def _on_server_lost(self, event: ServerLost, now: float) -> None:
        partition = event.partition
        cause = event.cause
        if partition not in self._servers.reports and not event.died:
            self._fail(f"server {partition} could not be started: {cause}")
            return
        self._servers.lost(partition, now)
        self._checkpoints.abandon(now)
        if self._phase == "ending":
            self._evaluations.forget(self._servers.epochs)
        if self._phase == "ending" and self._end_status == "finished":
            self._phase = "training"  # the batches that the restored server will lack must be trained again
            self._end_deadline = inf
        self._actions += self._servers.start(partition)
        self._charge("server_lost", f"server {partition} was lost: {cause}")

    def _on_report(self, event: Reported, now: float) -> None:
        partition = event.report.partition
        before = self._servers.reports.get(partition)
        taken = self._servers.take(event, now)
        if taken is None:
            return
        report, absent_s = taken
        for lease, lost in self._ledger.reported(report, event.asked):
            self._on_settled(lease, lost.tolist(), now)
        self._failure_counts.progressed(self._ledger.epoch * self._grid.num_batches + self._ledger.done)
        self._worker_table.take_report(report, now)
        if self._overdue:
            self._silence_check_at = now
        if absent_s is not None and before is not None:
            batches_lost = max(0, before.contained(self._grid) - report.contained(self._grid))
            self._on_restored(partition, absent_s, batches_lost, now)
        self._watch_divergence()
        for batch in self._poison_tracker.rejected(report.rejected.items()):
            self._on_poison(batch)
        if self._phase != "starting" and self._servers.ready:
            self._history.advance(self._servers.epochs, self._servers.reports.values())
        if self._phase == "training":
            self._actions += self._leasing.call_off()

    def _on_restored(self, partition: int, absent_s: float, batches_lost: int, now: float) -> None:
        """Send a restored server the settings, live workers and skipped batches that its checkpoint may lack.

        Workers could not push while it was absent, so the time limits for their silence start again now.

        Args:
            partition: partition of the server.
            absent_s: seconds without this server.
            batches_lost: batches that the lost server had reported and the restored one lacks.
            now: time of the host's clock, in seconds.
        """
        self._note("server_restored", partition=partition, seconds=absent_s, batches_lost=batches_lost)
        for worker in self._worker_table:
            worker.alive_at = now
            worker.lane_failures = 0
        if self._settings:
            self._actions.append(ChangeServer(partition, self._settings))
        self._actions += [Join(worker.name) for worker in self._worker_table if worker.joined]
        self._actions += self._poison_tracker.skips(self._ledger)

    def _on_settled(self, lease: int, lost: list[int], now: float) -> None:
        """Note how many batches of its lease a dead worker left undone. The first of them may have killed it."""
        death = self._failure_counts.settled(lease)
        if death is None:
            return
        self._note("worker_recovered", worker=death.worker, seconds=now - death.at, batches_again=len(lost))
        if not lost or not death.suspicious:
            return
        batch = self._grid.batch(self._ledger.epoch, lost[0])  # the worker's current batch, or its next one
        if self._poison_tracker.died(batch):
            self._on_poison(batch)
        else:
            self._ledger.isolate(lost[0])

    def _on_poison(self, batch: BatchId) -> None:
        """Skip a poison batch, or fail the run because of it."""
        self._failure_counts.count("poison")
        tries = self._poison_tracker.tries(batch)
        attempts = f"{batch.text} was tried {counted(tries, 'time')}"
        cause = f"{attempts}, and each time its worker died or its gradient was not finite"
        if self._spec.failure.poison == "fail":
            self._fail(
                f"{cause}. Check the examples of this batch (shards and their batches are counted from 0), or set "
                "failure.poison to skip"
            )
            return
        self._note("poison_skipped", batch=batch, tries=tries)
        self._actions += self._poison_tracker.skips(self._ledger)

    def _watch_divergence(self) -> None:
        """Fail the run if too many gradients were not finite since this process started or resumed it."""
        if not self._servers.ready:
            return
        rejected = max(report.pushes["rejected"] for report in self._servers.reports.values())
        if self._rejected_before is None:
            self._rejected_before = rejected
        if rejected - self._rejected_before > self._spec.failure.max_rejected:
            self._fail(
                f"training diverged: {counted(rejected - self._rejected_before, 'gradient')} had values that are not "
                f"finite, and failure.max_rejected is {self._spec.failure.max_rejected}. Lower optimizer.lr, or set "
                "optimizer.max_grad_norm"
            )

    def _on_save(self, event: Saved | SaveFailed | Committed, now: float) -> None:
        if not self._checkpoints.concerns(event):
            return
        commit = self._checkpoints.take(event, now)
        if commit:
            self._actions.append(commit)
        if isinstance(event, SaveFailed):
            self._failure_counts.count("save_failed")
            if self._checkpoints.last and not self._checkpoints.paused(now):
                self._finish_unsaved(event.cause)

    def _finish_unsaved(self, cause: str) -> None:
        epochs = counted(self._servers.epochs, "complete epoch")
        reached = f"{counted(self._servers.updates, 'update')} and {epochs}"
        self._finish = self._finish or Finish(
            "unsaved",
            f"training reached {reached}, but the last checkpoint could not be written: {cause}; "
            f"{self._checkpoints.status.text}. Repair the storage; --resume then continues from the newest checkpoint, "
            "or from the beginning if there is none",
        )

    def _change(self, settings: Settings) -> None:
        self._settings = settings
        self._leasing.change(settings.consistency)
        self._actions += [ChangeServer(partition, settings) for partition in range(self._partitions)]

    def _close(self, worker: WorkerRecord, lease: int, now: float, whole: bool = False) -> None:
        self._worker_table.closed(worker, lease, now, whole)
        self._ledger.close(lease)

    def _remove_worker(self, worker: WorkerRecord, now: float, suspicious: bool = False) -> None:
        if worker.leases:
            self._failure_counts.died(next(iter(worker.leases)), worker.name, now, suspicious)
        for lease in list(worker.leases):
            self._close(worker, lease, now)
        self._evaluations.worker_lost(worker)
        if worker.joined:
            self._actions.append(Leave(worker.name))
        self._worker_table.remove(worker.name)

    def _charge(self, kind: str, cause: str) -> None:
        """Count a failure. Fail the run if there were more than `failure.max_failures`."""
        self._failure_counts.count(kind)
        allowed = self._spec.failure.max_failures
        if 0 <= allowed < self._failure_counts.charged:
            self._fail(
                f"{cause}. That is failure {self._failure_counts.charged}, and failure.max_failures is {allowed}; "
                "--resume continues from the newest checkpoint"
            )

    def _note(self, event: str, **fields: Any) -> None:
        self._actions.append(Note(event, fields))

    def _fail(self, cause: str) -> None:
        self._finish = self._finish or Finish("failed", cause)

    # Decisions: the actions that follow from the state

    def _decide(self, now: float) -> None:
        self._give_up_silent(now)
        self._adjust_workers(now)
        if self._phase == "starting":
            self._begin(now)
        if self._phase == "training" and self._servers.ready:
            self._change_epoch()
            self._end_if_due(now)
        if self._phase == "training" and self._servers.ready:
            self._actions += self._leasing.lease(now)
            if self._checkpoints.due(self._servers.updates, now):
                self._actions.append(self._checkpoints.begin(self._servers.updates))
        if self._phase == "ending":
            self._finish_if_done(now)
        if self._servers.ready:
            self._actions += self._evaluations.assign(now)
        hurry = self._phase == "ending" or not self._ledger.pending or self._leasing.holds
        self._actions += self._servers.ask(self._ledger.newest_doubt, hurry)

    def _give_up_silent(self, now: float) -> None:
        """Stop the workers that have shown no sign of life for too long."""
        if now < self._silence_check_at:
            return
        failure_spec = self._spec.failure
        servers = self._servers
        for worker in list(self._worker_table):
            deadline = self._worker_table.silence_deadline(worker, failure_spec, servers.ready)
            if now >= deadline and (not worker.at_work or servers.reported_at >= deadline):
                silent_s = now - worker.alive_at
                cause = f"no sign of life for {silent_s:.1f} s (see failure.timeout_s)"
                if not worker.up:
                    cause = f"not started after {silent_s:.1f} s (see failure.start_timeout_s)"
                self._actions.append(StopWorker(worker.name, cause))
                self._remove_worker(worker, now, suspicious=worker.up)
                self._charge("worker_silent", f"{worker.name}: {cause}")
        # A worker that gets work after this check cannot be overdue before `later`.
        later = now + min(LEAST_SILENCE_TIMEOUT_S, failure_spec.timeout_s)
        soonest = min(
            (self._worker_table.silence_deadline(w, failure_spec, servers.ready) for w in self._worker_table),
            default=later,
        )
        self._overdue = soonest <= now
        self._silence_check_at = later if self._overdue else min(later, soonest)

    def _adjust_workers(self, now: float) -> None:
        """Start and stop workers until there are as many as wanted."""
        wanted = self._worker_table.target
        if self._phase == "ending":
            wanted = 1 if self._evaluations.waiting and self._end_status != "interrupted" else 0
        else:
            for worker in self._worker_table.surplus():
                self._actions.append(self._leasing.cancel(worker))
            for worker in [worker for worker in self._worker_table.draining if not worker.busy]:
                self._actions.append(StopWorker(worker.name, "the number of workers was reduced"))
                self._remove_worker(worker, now)
        self._actions += [StartWorker(worker.name) for worker in self._worker_table.hire(wanted, now)]

    def _begin(self, now: float) -> None:
        """Begin to train once all servers have reported and enough workers are up.

        Lock-step modes, and jobs whose number of workers may vary, wait for the least number of workers. Others wait
        for all workers, but not long after the first one is up: a short run should not be over before they come.
        """
        if self._worker_table.up and self._company_deadline == inf:
            self._company_deadline = now + COMPANY_S
        is_late = not self._waits_for_least and now >= self._company_deadline
        if self._servers.ready and (self._worker_table.complete or is_late):
            self._phase = "training"
            self._began = self._checkpoints.closed_at = now
            self._history.begin(self._servers.epochs)
            self._start_epoch()
            self._failure_counts.begin(self._ledger.epoch * self._grid.num_batches + self._ledger.done)

    @property
    def _waits_for_least(self) -> bool:
        """Return True if training begins only once the least number of workers is up."""
        return self._leasing.in_lockstep or self._worker_table.least < self._worker_table.target

    def _start_epoch(self) -> None:
        self._ledger.start_epoch(self._servers.epochs)
        for report in self._servers.reports.values():
            self._ledger.reported(report, asked=0)
        self._actions += self._poison_tracker.skips(self._ledger)

    def _change_epoch(self) -> None:
        """Start the next epoch once this one is complete, or reopen an epoch that a restored partition lacks."""
        epochs = self._servers.epochs
        if epochs < self._ledger.epoch:
            self._note("epoch_reopened", epoch=epochs)
            self._evaluations.forget(epochs)
            self._start_epoch()
            return
        if not self._ledger.complete:
            return
        if self._limits.validates(epochs):
            self._evaluations.want(epochs)
        if self._evaluations.open < EVALUATIONS_BEHIND or self._limits.reached(epochs, self._servers.updates):
            self._start_epoch()

    def _end_if_due(self, now: float) -> None:
        """End the run if a limit of the job or its target is reached."""
        epochs = self._servers.epochs
        results = self._evaluations.results.values()
        target = self._limits.target_reached(epochs, self._servers.reports.values(), results)
        out_of_time = now >= self._limits.deadline(self._began)
        if target or out_of_time or self._limits.reached(epochs, self._servers.updates):
            self._end("finished", now)

    # The end

    def _end(self, status: Status, now: float) -> None:
        """End the run after the current batches. If the run is ending already, an interruption makes it end sooner."""
        limit_s = INTERRUPT_S if status == "interrupted" else self._spec.failure.timeout_s
        self._end_deadline = min(self._end_deadline, now + limit_s)
        if status == "interrupted":
            self._checkpoints.hurry()
        if self._phase != "ending" or status == "interrupted":
            self._end_status = status
        if self._phase != "ending":
            self._actions += [self._leasing.cancel(worker) for worker in self._worker_table if worker.leases]
        self._phase = "ending"

    def _finish_if_done(self, now: float) -> None:
        """Take the next step of the end: settle the leases, write the last checkpoint, evaluate, finish."""
        if now >= self._end_deadline:
            self._abandon_leases(now)
            if self._end_status == "interrupted" and not self._servers.ready and self._servers.reports:
                self._finish = Finish(self._end_status)  # without the weights of the lost server
                return
        if not self._ledger.settled or self._checkpoints.busy or (self._servers.reports and not self._servers.ready):
            return
        unsaved = (
            self._checkpoints.lacks(self._servers.updates) or self._checkpoints.saved_epochs < self._servers.epochs
        )
        if self._servers.reports and unsaved:
            if not self._checkpoints.paused(now):
                self._actions.append(self._checkpoints.begin(self._servers.updates, last=True))
            return
        if self._end_status == "interrupted":
            self._finish = Finish(self._end_status)
            return
        self._evaluations.want(self._final_weights())
        if not self._evaluations.open:
            self._finish = Finish(self._end_status)

    def _abandon_leases(self, now: float) -> None:
        """Stop the workers that still have a lease when the time for the end is over."""
        self._end_deadline = inf
        for worker in [worker for worker in self._worker_table if worker.leases]:
            self._actions.append(StopWorker(worker.name, "its lease did not end in time"))
            self._remove_worker(worker, now)

    def _final_weights(self) -> int | None:
        """Return the number of epochs in the final weights; None if they are not the weights at the end of an epoch."""
        epochs = self._servers.epochs
        at_epoch_end = epochs > 0 and all(r.epochs == epochs and not r.settled for r in self._servers.reports.values())
        return epochs if at_epoch_end else None
