"""The numbers of a run, under the names that `metrics.jsonl`, the result and the display share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from psgd.core.driver.coordinator import Coordinator
from psgd.core.server.report import Report, staleness_summary
from psgd_workers.messages import Evaluation

__all__ = ["run_metrics"]


def run_metrics(coordinator: Coordinator) -> dict[str, float | None]:
    """What the run's result reports as `metrics`; None for what was not measured (yet)."""
    reports = list(coordinator.reports.values())
    histogram = Counter[int]()
    for report in reports:
        histogram.update(report.staleness)
    losses = [loss for report in reports for loss in [report.losses.get(max(report.losses, default=0))] if loss]
    evaluation = _newest(coordinator)
    rates = {count: [rate for report in reports if (rate := report.rate(count))] for count in ("updates", "samples")}
    return {
        "train/loss": losses[0].mean if losses else None,
        "val/loss": evaluation.loss if evaluation else None,
        "val/accuracy": evaluation.accuracy if evaluation else None,
        "perf/updates_per_s": min(rates["updates"], default=None),
        "perf/samples_per_s": min(rates["samples"], default=None),
        "perf/bytes_per_push": _bytes_per_push(reports),
        "compression/residual_norm": coordinator.worker_table.residual_norm,
    } | {f"async/staleness_{name}": value for name, value in staleness_summary(histogram).items()}


def _bytes_per_push(reports: Sequence[Report]) -> float | None:
    """Of all partitions together."""
    pushes = [sum(report.pushes.values()) for report in reports]
    return sum(r.bytes_pushed / n for r, n in zip(reports, pushes, strict=True)) if pushes and all(pushes) else None


def _newest(coordinator: Coordinator) -> Evaluation | None:
    """Of the final weights, else of the newest epoch."""
    results = coordinator.evaluations.results
    return results[max(results, key=lambda epochs: float("inf") if epochs is None else epochs)] if results else None
