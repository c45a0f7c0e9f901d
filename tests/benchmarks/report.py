"""What the runs of all contenders come to: a table for people, a document for programs."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from tests.benchmarks.contender import CONTENDERS, Failure
from tests.benchmarks.measurement import Measurement

__all__ = ["Summary", "document", "machine", "summaries", "table"]


@dataclass(frozen=True, slots=True)
class Summary:
    """One contender's runs."""

    name: str
    runs: tuple[Measurement, ...]
    failures: tuple[Failure, ...]

    @property
    def rates(self) -> list[float]:
        """Updates per second of each run."""
        return [run.updates_per_s for run in self.runs]

    @property
    def val_accuracy(self) -> float:
        """The lowest of any run."""
        return min(run.val_accuracy for run in self.runs)

    def share_of(self, other: Summary) -> float | None:
        """This contender's median rate over another's; None where either has no run."""
        return median(self.rates) / median(other.rates) if self.runs and other.runs else None


def summaries(outcomes: Iterable[Measurement | Failure]) -> list[Summary]:
    """The outcomes by contender, in the order of their first run."""
    found = list(outcomes)
    return [
        Summary(
            name,
            tuple(one for one in found if isinstance(one, Measurement) and one.name == name),
            tuple(one for one in found if isinstance(one, Failure) and one.name == name),
        )
        for name in dict.fromkeys(one.name for one in found)
    ]


def table(results: Sequence[Summary]) -> Table:
    """One row a contender."""
    rows = Table(title="gradients of 128 examples applied per second")
    for title in ("contender", "median", "min-max", "psgd is", "accuracy", "failed"):
        rows.add_column(title, justify="left" if title == "contender" else "right")
    for result in results:
        rows.add_row(CONTENDERS[result.name], *_cells(result, _ratio(results, result)), str(len(result.failures)))
    return rows


def document(results: Sequence[Summary], settings: dict[str, Any]) -> dict[str, Any]:
    """Everything measured, and on what; neither host names nor paths."""
    return {
        "settings": settings,
        "machine": machine(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("numpy", "psgd", "ray", "torch")},
        "contenders": [
            {
                "name": result.name,
                "updates_per_s": _spread(result.rates),
                "psgd_ratio": _ratio(results, result),
                "runs": [asdict(run) for run in result.runs],
                "failures": len(result.failures),  # why was said when it happened; errors may name paths
            }
            for result in results
        ],
    }


def machine() -> dict[str, Any]:
    """The processor, and how much of it the benchmark may use."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {
        "cpu": next(models, platform.machine()),
        "cores_used": len(os.sched_getaffinity(0)),
        "cores": os.cpu_count(),
        "system": platform.system(),
    }


def _ratio(results: Sequence[Summary], to: Summary) -> float | None:
    return next((result.share_of(to) for result in results if result.name == "psgd_job"), None)


def _spread(rates: Sequence[float]) -> dict[str, float] | None:
    return {"median": median(rates), "min": min(rates), "max": max(rates)} if rates else None


def _cells(result: Summary, ratio: float | None) -> tuple[str, str, str, str]:
    if not result.runs:
        return "failed", "", "", ""
    rates = result.rates
    return (
        f"{median(rates):,.0f}",
        f"{min(rates):,.0f}-{max(rates):,.0f}",
        "" if ratio is None else f"{ratio:.2f} ×",
        f"{result.val_accuracy:.3f}",
    )
