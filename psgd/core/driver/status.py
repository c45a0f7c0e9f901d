"""RunStatus: everything about a run that may be observed, at one instant.

The coordinator makes it on demand. Metrics, the progress display, the result and every exporter read this object and
nothing else of the coordinator, so they agree with each other and cannot disturb it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from psgd.result import LedgerCounts
from psgd_workers.messages import Evaluation

__all__ = [
    "CheckpointStatus",
    "EpochStatus",
    "RunPhase",
    "RunStatus",
    "ServerPhase",
    "ServerStatus",
    "WorkerPhase",
    "WorkerStatus",
]

RunPhase = Literal["starting", "training", "ending", "ended"]
ServerPhase = Literal["starting", "up", "restoring"]
WorkerPhase = Literal["starting", "idle", "working", "waiting", "evaluating", "leaving"]


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker process."""

    name: str
    phase: WorkerPhase  # waiting: its receipt is held back until other workers have pushed
    joined: bool  # True if the servers count it as live
    pushes: int  # since it last joined, as the newest reports say
    leases: int  # open ones
    leased: int  # batches in them
    batch_s: float | None  # seconds per batch, smoothed; None until a lease was done
    silent_s: float  # seconds since its last sign of life


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """One partition's server."""

    partition: int
    phase: ServerPhase
    incarnation: int  # 0 until its first report
    updates: int
    silent_s: float | None  # seconds since its newest report; None before the first


@dataclass(frozen=True, slots=True)
class EpochStatus:
    """A complete epoch, and the values that belong to it."""

    epoch: int  # from 1
    loss: float | None  # mean training loss over its examples; None if it was not reported
    validation: Evaluation | None  # of the weights at its end
    validating: bool  # True while `validation` may still come


@dataclass(frozen=True, slots=True)
class CheckpointStatus:
    """What storage holds, and how the newest attempt to add to it went."""

    updates: int | None  # saved; None if nothing is
    epochs: int  # saved complete epochs
    writing: bool
    last: bool  # True if the newest attempt was for the checkpoint that the run ends with
    retries: bool  # True if that one failed and will be tried again
    fault: str | None  # cause, if the newest attempt failed

    @property
    def text(self) -> str:
        """Say in words what storage holds."""
        if self.updates is None:
            return "nothing is saved"
        return f"saved is what was done up to {self.updates} updates and {self.epochs} complete epochs"


@dataclass(frozen=True, slots=True)
class RunStatus:
    """A run at one instant. Times are in seconds of the host's clock; epochs are counted from 1.

    Attributes:
        now: time at which this status was made.
        phase: part of the run's life.
        waiting_for: processes and steps that must act before the run goes on, such as `server 1`, `worker-3`,
            `checkpoint` or `validation of epoch 4`; empty while training advances.
        began: time at which training began in this process; None before.
        epochs: complete ones, in every partition.
        batches: done of the open epoch.
        num_batches: of one epoch.
        open_leases: leases at work or in doubt.
        updates: optimizer steps, of the partition with the fewest.
        examples: applied, of the partition with the fewest.
        updates_per_s: rate from the first step of this process to the newest.
        examples_per_s: likewise.
        bytes_per_push: over all partitions.
        residual_norm: norm of what compression has left out so far.
        loss: mean training loss over the examples of `loss_epoch` applied so far.
        loss_epoch: epoch that `loss` is of: the open one, or the last.
        validation: newest one.
        validation_epoch: epochs contained in the weights that `validation` is of; a fraction if training ended within
            an epoch.
        recent_epochs: newest complete epochs of this process, oldest first.
        workers: every living worker.
        target_workers: number of workers that there should be.
        servers: one for each partition.
        staleness: number of applied gradients by staleness, over all partitions.
        failures: number by kind.
        charged_failures: number that counts against `failure.max_failures`.
        goodput: batches that came into the weights, over batches computed, in this process.
        ledger: counts of batches over the whole run.
        checkpoint: what is saved.
    """

    now: float
    phase: RunPhase
    waiting_for: tuple[str, ...]
    began: float | None
    epochs: int
    batches: int
    num_batches: int
    open_leases: int
    updates: int
    examples: int
    updates_per_s: float | None
    examples_per_s: float | None
    bytes_per_push: float | None
    residual_norm: float
    loss: float | None
    loss_epoch: int | None
    validation: Evaluation | None
    validation_epoch: float | None
    recent_epochs: tuple[EpochStatus, ...]
    workers: tuple[WorkerStatus, ...]
    target_workers: int
    servers: tuple[ServerStatus, ...]
    staleness: Mapping[int, int]
    failures: Mapping[str, int]
    charged_failures: int
    goodput: float | None
    ledger: LedgerCounts
    checkpoint: CheckpointStatus

    @property
    def elapsed_s(self) -> float:
        """Seconds of training in this process."""
        return 0.0 if self.began is None else self.now - self.began

    @property
    def workers_up(self) -> int:
        """Number of workers that can train."""
        return sum(worker.phase != "starting" for worker in self.workers)
