"""The result of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["LedgerCounts", "Result", "Status"]

Status = Literal["finished", "stopped", "interrupted", "failed", "unsaved"]


@dataclass(frozen=True, slots=True)
class LedgerCounts:
    """Counts of batches and pushes over the whole run, across all resumptions."""

    batches: int  # distinct batches that are in the weights or were discarded
    applied: int  # pushes whose gradient is in the weights; equals batches - discarded, as no batch is applied twice
    duplicates: int  # pushes refused because their batch was applied already
    requeued: int  # batches that were leased again
    discarded: int  # batches that were given up and are not in the weights


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a run.

    A status of `unsaved` means that training reached its end, but the last state could not be written; `error` says
    what is saved.

    `metrics` has `train/loss`, `val/loss`, `val/accuracy`, `perf/updates_per_s`, `perf/samples_per_s`,
    `perf/bytes_per_push`, `perf/compiled`, `compression/residual_norm` and `async/staleness_{mean,p50,p95,max}`; a
    metric that was not measured is None. `train/epoch` and `val/epoch` are the epochs, counted from 1, in which the
    losses and the accuracy were measured; `val/epoch` is a fraction if the run ended within an epoch. `perf/*_per_s`
    are rates between the first and the last gradient that were applied since this driver started. `perf/compiled` is
    the share of its pushes that a server took in compiled code, since it started; of several servers, the smallest.
    """

    status: Status
    name: str
    path: str  # run directory
    epochs: int  # complete epochs
    updates: int  # optimizer steps
    samples: int  # examples whose gradients were applied
    duration_s: float  # seconds of training since this driver started
    metrics: dict[str, float | None]
    ledger: LedgerCounts
    failures: dict[str, int]  # kind -> number, since this driver started: worker_lost, worker_silent, server_lost, ...
    goodput: float | None  # share of computed batches applied or skipped, since this driver started
    checkpoint: str | None  # newest committed checkpoint
    error: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, in the order of `psgd train --json`."""
        return asdict(self)
