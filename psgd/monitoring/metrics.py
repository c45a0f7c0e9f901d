"""The numbers of a run, under the names that `metrics.jsonl`, the result and the display share."""

from __future__ import annotations

from psgd.core.driver.status import RunStatus
from psgd.core.server.report import staleness_summary

__all__ = ["metrics_row", "run_metrics"]


def run_metrics(status: RunStatus) -> dict[str, float | None]:
    """Return what the run's result reports as `metrics`; None for a value that was not measured (yet).

    `train/epoch` and `val/epoch` say which epoch, counted from 1, the losses and the accuracy are of: validation runs
    beside the next epoch's training, so the two differ.
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
        "compression/residual_norm": status.residual_norm,
    } | {f"async/staleness_{name}": value for name, value in staleness_summary(status.staleness).items()}


def metrics_row(status: RunStatus) -> dict[str, float | None]:
    """Return a line of `metrics.jsonl`: how far the run is, and its metrics."""
    position = {"epochs": status.epochs, "updates": status.updates, "workers": status.workers_up}
    return position | run_metrics(status)
