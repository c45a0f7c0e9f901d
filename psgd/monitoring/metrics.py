"""Metrics of a run, under the names in `metrics.jsonl` and in the result."""

from __future__ import annotations

from psgd.core.driver.status import RunStatus
from psgd.core.server.report import staleness_summary

__all__ = ["metrics_row", "run_metrics"]


def run_metrics(status: RunStatus) -> dict[str, float | None]:
    """Return the `metrics` of the run's result. A value is None if it was not measured, or not yet.

    `train/epoch` and `val/epoch` are the epochs, counted from 1, in which the losses and the accuracy were measured.
    They can differ, because the validation of an epoch runs during the next one.
    """
    validation = status.validation
    return {
        "train/loss": status.loss,
        "train/epoch": status.loss_epoch,
        "val/loss": validation.loss if validation else None,
        "val/accuracy": validation.accuracy if validation else None,
        "val/epoch": status.validation_epoch,
        "perf/updates_per_s": status.updates_per_s,
        "perf/samples_per_s": status.examples_per_s,
        "perf/bytes_per_push": status.bytes_per_push,
        "perf/compiled": status.compiled,
        "compression/residual_norm": status.residual_norm,
    } | {f"async/staleness_{name}": value for name, value in staleness_summary(status.staleness).items()}


def metrics_row(status: RunStatus) -> dict[str, float | None]:
    """Return a row of `metrics.jsonl`: the progress of the run, and its metrics."""
    progress = {"epochs": status.epochs, "updates": status.updates, "workers": status.workers_up}
    return progress | run_metrics(status)
