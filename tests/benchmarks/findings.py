"""Findings: measured figures with their targets, as a table for people and a document for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich.table import Table

from tests.benchmarks.machine import machine, versions

__all__ = ["Finding", "document", "ratio", "shown", "spread", "table", "target", "verdict"]


@dataclass(frozen=True, slots=True)
class Finding:
    """A measured figure and its target."""

    measure: str
    value: float | None  # None: it could not be measured
    unit: str = ""
    at_least: float | None = None  # bounds of the target; without a bound there is no target
    at_most: float | None = None
    turns: tuple[float, ...] = ()  # the same figure from each turn

    @property
    def met(self) -> bool | None:
        """Return True if the target is met; None if there is no target or no figure."""
        if self.value is None or (self.at_least is None and self.at_most is None):
            return None
        low = float("-inf") if self.at_least is None else self.at_least
        high = float("inf") if self.at_most is None else self.at_most
        return low <= self.value <= high

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and `met` as plain values."""
        return {
            "measure": self.measure,
            "value": self.value,
            "unit": self.unit,
            "at_least": self.at_least,
            "at_most": self.at_most,
            "met": self.met,
            "turns": list(self.turns),
        }

    @classmethod
    def of_dict(cls, tree: Mapping[str, Any]) -> Finding:
        """Read a finding from the plain values of `to_dict`."""
        fields = {name: value for name, value in tree.items() if name != "met"}
        return cls(**fields | {"turns": tuple(tree["turns"])})


def ratio(
    measure: str,
    over: Sequence[float],
    under: Sequence[float],
    at_least: float | None = None,
    at_most: float | None = None,
) -> Finding:
    """Return the ratio of two medians, measured in the same turns.

    Args:
        measure: name of the ratio.
        over: values of the numerator, by turn.
        under: values of the denominator, by turn.
        at_least: lower bound of the target, if there is one.
        at_most: upper bound of the target, if there is one.
    """
    if not over or not under:
        return Finding(measure, None, "×", at_least, at_most)
    turns = tuple(a / b for a, b in zip(over, under, strict=True)) if len(over) == len(under) else ()
    return Finding(measure, median(over) / median(under), "×", at_least, at_most, turns)


def table(title: str, findings: Sequence[Finding]) -> Table:
    """Return a table with one row for each figure."""
    rows = Table(title=title)
    for heading in ("measure", "target", "measured", "turns", "met"):
        rows.add_column(heading, justify="left" if heading == "measure" else "right")
    for one in findings:
        rows.add_row(one.measure, target(one), shown(one), spread(one), verdict(one))
    return rows


def target(finding: Finding) -> str:
    """Return the target as text; empty if there is none."""
    bounds = [("≥", finding.at_least), ("≤", finding.at_most)]
    return ", ".join(f"{sign} {_number(bound)}" for sign, bound in bounds if bound is not None)


def shown(finding: Finding) -> str:
    """Return the figure with its unit."""
    return "failed" if finding.value is None else f"{_number(finding.value)} {finding.unit}".rstrip()


def spread(finding: Finding) -> str:
    """Return the range over the turns; empty if there was only one turn."""
    return f"{_number(min(finding.turns))} to {_number(max(finding.turns))}" if len(finding.turns) > 1 else ""


def verdict(finding: Finding) -> str:
    """Return `yes` if the target is met, else `no`; empty if there is no target."""
    if finding.at_least is None and finding.at_most is None:
        return ""
    return "yes" if finding.met else "no"


def document(findings: Sequence[Finding], settings: Mapping[str, Any], runs: Any) -> dict[str, Any]:
    """Return all results, with settings, machine and versions, but without host names and paths.

    Args:
        findings: the figures.
        settings: settings of the benchmark.
        runs: measurements that the findings were computed from.
    """
    return {
        "settings": dict(settings),
        "machine": machine(),
        "versions": versions(),
        "findings": [one.to_dict() for one in findings],
        "runs": runs,
    }


def _number(value: float) -> str:
    """Return three significant digits, and all digits before the point."""
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
