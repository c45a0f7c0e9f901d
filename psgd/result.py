"""What a run came to."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["LedgerCounts", "Result", "Status"]

Status = Literal["finished", "stopped", "interrupted", "failed", "unsaved"]


@dataclass(frozen=True, slots=True)
class LedgerCounts:
    """What became of the batches, over the whole run, resumptions included."""

    batches: int  # different batches in the weights, or done without
    applied: int  # pushes whose gradient is in the weights; `batches`, less `discarded`: else one was counted twice
    duplicates: int  # pushes refused because their batch was in the weights already
    requeued: int  # batches leased again
    discarded: int  # pushes refused for good, their batches done without


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ended.

    `unsaved`: as far as it was to go, but what it came to could not be written; `error` says what is saved.

    `metrics` has `train/loss`, `val/loss`, `val/accuracy`, `perf/updates_per_s`, `perf/samples_per_s`,
    `perf/bytes_per_push`, `compression/residual_norm` and `async/staleness_{mean,p50,p95,max}`; a metric that was not
    measured is None. `train/epoch` and `val/epoch` are the epochs, from 1, that the losses and the accuracy are of; a
    fraction if the validated weights are those of a run that ended within an epoch. `perf/*_per_s`
    are rates from the first applied gradient of this process to the last.
    """

    status: Status
    name: str
    path: str  # of the run directory
    epochs: int  # complete ones
    updates: int  # optimizer steps
    samples: int  # examples applied
    duration_s: float  # of this process's training, start-up left out
    metrics: dict[str, float | None]
    ledger: LedgerCounts
    failures: dict[str, int]  # of this process, by kind: worker_lost, worker_silent, server_lost, preempted, ...
    goodput: float | None  # batches that came into the weights, over batches computed, of this process
    checkpoint: str | None  # the newest committed one
    error: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, in the order of `psgd train --json`."""
        return asdict(self)
