"""The report on the runs of all contenders, as a table for people and a document for programs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from rich.table import Table

from tests.benchmarks.contender import CONTENDERS, LIMIT, Failure
from tests.benchmarks.findings import Finding, ratio, target, verdict
from tests.benchmarks.findings import document as document_of
from tests.benchmarks.measurement import Measurement

__all__ = ["Summary", "document", "findings", "summaries", "table"]


@dataclass(frozen=True, slots=True)
class Summary:
    """The runs of one contender."""

    name: str
    runs: tuple[Measurement, ...]
    failures: tuple[Failure, ...]

    @property
    def rates(self) -> list[float]:
        """Updates per second of each run."""
        return [run.updates_per_s for run in self.runs]

    @property
    def round_trips_ns(self) -> list[float]:
        """Times of a message between the cores before each run, in ns; empty if they could not be measured."""
        return [run.details["round_trip_ns"] for run in self.runs if "round_trip_ns" in run.details]

    @property
    def val_accuracy(self) -> float:
        """The lowest accuracy of any run."""
        return min(run.val_accuracy for run in self.runs)


def summaries(outcomes: Iterable[Measurement | Failure]) -> list[Summary]:
    """Group outcomes by contender, in the order of their first runs."""
    found = list(outcomes)
    return [
        Summary(
            name,
            tuple(one for one in found if isinstance(one, Measurement) and one.name == name),
            tuple(one for one in found if isinstance(one, Failure) and one.name == name),
        )
        for name in dict.fromkeys(one.name for one in found)
    ]


def findings(results: Sequence[Summary]) -> list[Finding]:
    """Return ratios of median rates: of psgd to each other contender, and of psgd's variants to the limit.

    A ratio is left out if one of its two contenders was not measured.
    """
    by_name = {result.name: result for result in results}
    psgd = by_name.get("psgd_job")
    limit = by_name.get(LIMIT)
    found = [_over(psgd, result) for result in results if psgd is not None and result is not psgd]
    return found + [_of_limit(result, limit) for result in results if limit is not None and _has_share(result)]


def _has_share(result: Summary) -> bool:
    return CONTENDERS[result.name].share is not None


def _of_limit(result: Summary, limit: Summary) -> Finding:
    contender = CONTENDERS[result.name]
    return ratio(
        f"gradients/s of {contender.title} ÷ {CONTENDERS[LIMIT].title}", result.rates, limit.rates, contender.share
    )


def _over(psgd: Summary, other: Summary) -> Finding:
    contender = CONTENDERS[other.name]
    return ratio(f"gradients/s of psgd ÷ {contender.title}", psgd.rates, other.rates, contender.target)


def table(results: Sequence[Summary]) -> Table:
    """Return a table with one row for each contender."""
    rows = Table(title="gradients of 128 examples applied per second")
    compared_with = ("psgd is", "target", "met", "÷ limit", "target", "met")
    for heading in ("contender", "median", "min-max", "accuracy", *compared_with, "failed"):
        rows.add_column(heading, justify="left" if heading == "contender" else "right")
    compared = {result.name: one for result, one in _compared(results)}
    limit = next((result for result in results if result.name == LIMIT), None)
    shares = {result.name: _of_limit(result, limit) for result in results if limit is not None and _has_share(result)}
    for result in results:
        rows.add_row(
            CONTENDERS[result.name].title,
            *_rates(result),
            *_comparison(compared.get(result.name)),
            *_comparison(shares.get(result.name)),
            str(len(result.failures)),
        )
    return rows


def document(results: Sequence[Summary], settings: dict[str, Any]) -> dict[str, Any]:
    """Return all results, with settings, machine and versions, but without host names and paths."""
    contenders = [
        {
            "name": result.name,
            "title": CONTENDERS[result.name].title,
            "updates_per_s": _spread(result.rates),
            "round_trip_ns": _spread(result.round_trips_ns),
            "runs": [asdict(run) for run in result.runs],
            "failures": len(result.failures),  # without messages, which were printed and may name paths
        }
        for result in results
    ]
    return document_of(findings(results), settings, contenders)


def _compared(results: Sequence[Summary]) -> list[tuple[Summary, Finding]]:
    psgd = next((result for result in results if result.name == "psgd_job"), None)
    return [] if psgd is None else [(result, _over(psgd, result)) for result in results if result is not psgd]


def _spread(rates: Sequence[float]) -> dict[str, float] | None:
    return {"median": median(rates), "min": min(rates), "max": max(rates)} if rates else None


def _rates(result: Summary) -> tuple[str, str, str]:
    if not result.runs:
        return "failed", "", ""
    rates = result.rates
    return f"{median(rates):,.0f}", f"{min(rates):,.0f}-{max(rates):,.0f}", f"{result.val_accuracy:.3f}"


def _comparison(finding: Finding | None) -> tuple[str, str, str]:
    if finding is None or finding.value is None:
        return "", "", ""
    return f"{finding.value:.2f} ×", target(finding), verdict(finding)
