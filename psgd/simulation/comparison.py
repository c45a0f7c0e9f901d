"""An HTML page with tables and figures that compares the results of simulations."""

from __future__ import annotations

from collections.abc import Sequence

from psgd.monitoring.page import Page
from psgd.monitoring.plots import Curve, bars, curves, histogram
from psgd.simulation.simulate import ROW_NAMES, SimulationResult, row_values

__all__ = ["page"]

LOG_FROM = 30.0  # smallest ratio of the largest to the smallest value for which the axis is logarithmic


def page(results: Sequence[SimulationResult], lead: str) -> str:
    """Return one self-contained HTML page.

    Args:
        results: at least one result.
        lead: sentence at the top of the page that describes the simulation.
    """
    metric = results[0].metric
    sheet = Page("Simulated on a virtual clock", lead)
    columns = [row_values(result) for result in results]  # a column per result: names are long
    rows = [[name, *cells] for name, *cells in zip(ROW_NAMES, *columns, strict=True)]
    sheet.add_table(["", *(result.name for result in results)], rows)
    values = [point.value for result in results for point in result.curve if point.value > 0]
    log_y = bool(values) and max(values) / min(values) > LOG_FROM and metric != "val/accuracy"
    for axis, label in (("time_s", "virtual seconds"), ("examples", "examples in the weights")):
        lines = [
            Curve(result.name, [getattr(point, axis) for point in result.curve], [p.value for p in result.curve])
            for result in results
        ]
        sheet.add_figure(curves(lines, label, metric, log_y=log_y), f"{metric} over {label}.")
    if len(results) > 1:
        sheet.add_figure(
            bars({r.name: r.examples_per_s for r in results}, "mode", "examples per virtual second"),
            "Examples applied to the weights per virtual second.",
        )
    for result in results:
        sheet.add_heading(result.name)
        if result.staleness_counts:
            sheet.add_figure(
                histogram(result.staleness_counts, "staleness, versions", "gradients"),
                f"Staleness of the gradients in the weights; mean {result.staleness['mean']:.2f}.",
            )
        shares = dict(sorted(result.shares.items(), key=lambda item: -item[1]))
        sheet.add_figure(
            bars(shares, "worker", "share"),
            f"Each worker's share of the gradients in the weights; an equal share is {1 / max(1, len(shares)):.4f}.",
        )
    return sheet.html()
