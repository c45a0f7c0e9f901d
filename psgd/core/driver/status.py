"""RunStatus: everything about a run that may be observed, at one instant.

The coordinator makes it on demand. Metrics, the progress display, the result and every exporter read this object and
nothing else of the coordinator, so they agree with each other and cannot disturb it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from psgd.result import LedgerCounts
from psgd_workers.counting import counted
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
    pushes: int  # number of pushes since it last joined, according to the newest reports
    leases: int  # leases that it has
    leased: int  # batches in these leases
    batch_s: float | None  # smoothed seconds per batch; None until it has finished a lease
    silent_s: float  # seconds since its last sign of life


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """One partition's server."""

    partition: int
    phase: ServerPhase
    incarnation: int  # 0 until its first report
    updates: int  # steps taken
    silent_s: float | None  # seconds since its newest report; None before the first


@dataclass(frozen=True, slots=True)
class EpochStatus:
    """A complete epoch, and the values that belong to it."""

    epoch: int  # from 1
    loss: float | None  # mean training loss over its examples; None if it was not reported
    validation: Evaluation | None  # evaluation of the weights at its end
    validating: bool  # True while `validation` may still come


@dataclass(frozen=True, slots=True)
class CheckpointStatus:
    """The newest committed checkpoint, and the newest attempt to write one."""

    updates: int | None  # updates in the newest checkpoint; None if there is none
    epochs: int  # complete epochs in the newest checkpoint
    writing: bool  # True while a checkpoint is being written
    last: bool  # True if the newest attempt was for the last checkpoint of the run
    retries: bool  # True if the newest attempt failed and will be tried again
    fault: str | None  # cause, if the newest attempt failed

    @property
    def text(self) -> str:
        """Return a clause about the newest checkpoint, for messages."""
        if self.updates is None:
            return "nothing is saved"
        epochs = counted(self.epochs, "complete epoch")
        return f"the newest checkpoint contains {counted(self.updates, 'update')} and {epochs}"


@dataclass(frozen=True, slots=True)
class RunStatus:
    """A run at one instant. Times are in seconds of the host's clock; epochs are counted from 1.

    Attributes:
        now: time at which this status was made.
        phase: part of the run's life.
        waiting_for: processes and steps that must act before the run continues, such as `server 1`, `worker-3`,
            `checkpoint` or `validation of epoch 4`; empty while training advances.
        began: time at which training began in this process; None before.
        epochs: number of epochs that are complete in every partition.
        batches: number of batches of the open epoch that are done.
        num_batches: number of batches in an epoch.
        open_leases: number of leases at work or in doubt.
        updates: optimizer steps of the partition with the fewest.
        examples: examples applied in the partition with the fewest.
        updates_per_s: updates per second, from the first step of this process to the newest.
        examples_per_s: examples per second, over the same time.
        bytes_per_push: mean size of a push, summed over all partitions.
        compiled: share of the pushes that compiled code took, of the server with the smallest share; Python took the
            rest. None before the first push, and in a simulation.
        residual_norm: norm of the gradient parts that compression has left out and that no later push has delivered.
        loss: mean training loss over the examples of `loss_epoch` applied so far.
        loss_epoch: epoch of `loss`: the newest one with a training loss.
        validation: newest evaluation.
        validation_epoch: epochs of training in the validated weights; a fraction if training ended within an epoch.
        recent_epochs: newest complete epochs of this process, oldest first.
        workers: every living worker.
        target_workers: number of workers that there should be.
        servers: every server, by partition.
        staleness: number of applied gradients by staleness, over all partitions.
        failures: number of failures by kind.
        charged_failures: number of failures that count against `failure.max_failures`.
        goodput: share of the batches computed in this process that were applied or skipped.
        ledger: counts of batches over the whole run.
        checkpoint: newest checkpoint, and the newest attempt to write one.
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
    compiled: float | None
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
        """Return the seconds of training in this process."""
        return 0.0 if self.began is None else self.now - self.began

    @property
    def workers_up(self) -> int:
        """Return the number of workers that have started."""
        return sum(worker.phase != "starting" for worker in self.workers)
