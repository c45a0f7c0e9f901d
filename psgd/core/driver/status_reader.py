"""The status reader: makes a RunStatus from the parts of a coordinator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

from psgd.core.driver.checkpoint_schedule import CheckpointSchedule
from psgd.core.driver.evaluations import Evaluations
from psgd.core.driver.failures import FailureCounts
from psgd.core.driver.history import History
from psgd.core.driver.ledger import Ledger
from psgd.core.driver.server_reports import ServerReports
from psgd.core.driver.status import EpochStatus, RunPhase, RunStatus, ServerStatus, WorkerStatus
from psgd.core.driver.workers import WorkerTable
from psgd.core.server.report import EpochLoss, Report
from psgd.result import LedgerCounts
from psgd_workers.messages import EpochGrid, Evaluation

__all__ = ["StatusReader"]


@dataclass(frozen=True, slots=True)
class StatusReader:
    """Reads the parts of one coordinator and changes none of them."""

    grid: EpochGrid
    ledger: Ledger
    servers: ServerReports
    worker_table: WorkerTable
    evaluations: Evaluations
    checkpoints: CheckpointSchedule
    failure_counts: FailureCounts
    history: History

    def read(self, now: float, phase: RunPhase, began: float | None, to_validate: int | None) -> RunStatus:
        """Make the status.

        Args:
            now: time of the host's clock, in seconds.
            phase: part of the run's life.
            began: time at which training began; None before.
            to_validate: epoch whose weights are validated at the end of the run; None if there is no such epoch.
        """
        reports = self.servers.reports.values()
        parked = frozenset[str]().union(*(report.parked for report in reports))
        workers = self.worker_table.status(parked, now)
        servers = self.servers.status(now)
        loss_epoch, loss = self._loss()
        validation_epoch, validation = self._validation()
        return RunStatus(
            now=now,
            phase=phase,
            waiting_for=self._waiting_for(phase, servers, workers),
            began=began,
            epochs=self.servers.epochs,
            batches=self.ledger.done,
            num_batches=self.grid.num_batches,
            open_leases=self.ledger.open_leases,
            updates=self.servers.updates,
            examples=min((report.samples for report in reports), default=0),
            updates_per_s=self._rate("updates"),
            examples_per_s=self._rate("samples"),
            bytes_per_push=self._bytes_per_push(),
            compiled=self._compiled(),
            residual_norm=self.worker_table.residual_norm,
            loss=loss,
            loss_epoch=loss_epoch,
            validation=validation,
            validation_epoch=validation_epoch,
            recent_epochs=self._recent_epochs(to_validate),
            workers=workers,
            target_workers=self.worker_table.target,
            servers=servers,
            staleness=self._staleness(),
            failures=dict(self.failure_counts.failures),
            charged_failures=self.failure_counts.charged,
            goodput=self.failure_counts.goodput(self.servers.pushes),
            ledger=self._counts(),
            checkpoint=self.checkpoints.status,
        )

    def _counts(self) -> LedgerCounts:
        pushes = [report.pushes for report in self.servers.reports.values()]
        return LedgerCounts(
            batches=self.ledger.epoch * self.grid.num_batches + self.ledger.done,
            applied=min((p["applied"] for p in pushes), default=0),
            duplicates=sum(p["duplicate"] for p in pushes),
            requeued=self.ledger.requeued,
            discarded=max((p["discarded"] for p in pushes), default=0),
        )

    def _rate(self, count: str) -> float | None:
        """Return the updates or samples per second (`count` names which) of the slowest partition."""
        rates = [rate for report in self.servers.reports.values() if (rate := report.rate(count)) is not None]
        return min(rates, default=None)

    def _bytes_per_push(self) -> float | None:
        """Return the mean size of a push, summed over all partitions; None until each of them has received one."""
        reports: Mapping[int, Report] = self.servers.reports
        pushes = {partition: report.num_pushes for partition, report in reports.items()}
        if not pushes or not all(pushes.values()):
            return None
        return sum(report.bytes_pushed / pushes[partition] for partition, report in reports.items())

    def _compiled(self) -> float | None:
        """Return the share of pushes that compiled code took, of the partition where it is smallest."""
        shares = [report.compiled for report in self.servers.reports.values() if report.compiled is not None]
        return min(shares, default=None)

    def _staleness(self) -> dict[int, int]:
        histogram = Counter[int]()
        for report in self.servers.reports.values():
            histogram.update(report.staleness)
        return dict(histogram)

    def _loss(self) -> tuple[int | None, float | None]:
        """Return the newest epoch that has a training loss, from 1, and that loss."""
        newest: tuple[int, EpochLoss] | None = None
        for report in self.servers.reports.values():
            for epoch, loss in report.losses.items():
                if newest is None or epoch > newest[0]:
                    newest = epoch, loss
        return (None, None) if newest is None else (newest[0] + 1, newest[1].mean)

    def _validation(self) -> tuple[float | None, Evaluation | None]:
        """Return the number of epochs in the newest validated weights, and their evaluation."""
        results = self.evaluations.results
        if not results:
            return None, None
        newest = max(results, key=lambda epochs: inf if epochs is None else epochs)
        final_epochs = self.servers.epochs + self.ledger.done / self.grid.num_batches
        return (final_epochs if newest is None else newest), results[newest]

    def _recent_epochs(self, to_validate: int | None) -> tuple[EpochStatus, ...]:
        results = self.evaluations.results
        awaited = {*self.evaluations.awaited, to_validate if self.evaluations.enabled else None}
        return tuple(
            EpochStatus(epoch, loss, results.get(epoch), validating=epoch in awaited and epoch not in results)
            for epoch, loss in self.history
        )

    def _waiting_for(
        self, phase: RunPhase, servers: tuple[ServerStatus, ...], workers: tuple[WorkerStatus, ...]
    ) -> tuple[str, ...]:
        """Return `RunStatus.waiting_for`."""
        if phase == "ended":
            return ()
        down = tuple(f"server {server.partition}" for server in servers if server.phase != "up")
        if down or phase == "starting":
            absent = tuple(worker.name for worker in workers if worker.phase == "starting")
            return down + (absent if phase == "starting" else ())
        return self._waiting_to_end(workers) if phase == "ending" else self._waiting_to_train(workers)

    def _waiting_to_train(self, workers: tuple[WorkerStatus, ...]) -> tuple[str, ...]:
        if all(worker.phase == "starting" for worker in workers):
            return tuple(worker.name for worker in workers) or ("workers",)
        if self.ledger.complete:
            return self._open_validations()
        if any(worker.phase == "waiting" for worker in workers):
            return tuple(worker.name for worker in workers if worker.phase == "working")
        return ()

    def _waiting_to_end(self, workers: tuple[WorkerStatus, ...]) -> tuple[str, ...]:
        leased = tuple(worker.name for worker in workers if worker.leased)
        if leased or self.checkpoints.busy:
            return leased or ("checkpoint",)
        return ("storage",) if self.checkpoints.status.retries else self._open_validations()

    def _open_validations(self) -> tuple[str, ...]:
        return tuple(
            "validation of the final weights" if epochs is None else f"validation of epoch {epochs}"
            for epochs in self.evaluations.awaited
        )
