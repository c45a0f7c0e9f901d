"""Cost of the parameter server by batch size: `python -m tests.benchmarks.batch_sizes`.

The larger a batch, the longer a worker computes between two pushes, and the less the push and the server's step count.
In the setting of `throughput`, psgd and two separate loops of its own backpropagation take turns with each batch size.
The efficiency is psgd's gradients per second over those of both loops: 1 means that the parameter server costs nothing.
psgd validates at the end only, because the loops do not validate. The document has a figure beside it, an SVG file.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from tests.benchmarks.command import begin, parser, write
from tests.benchmarks.contender import LIMIT, Failure, run_turn
from tests.benchmarks.findings import Finding, document, ratio, spread
from tests.benchmarks.measurement import Measurement
from tests.benchmarks.report import summaries

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Rates", "figure", "findings", "joined", "main", "rates", "table"]

PSGD = "psgd_unvalidated_job"
BATCH_SIZES = (32, 128, 512, 2048)
INK = "#222222"


@dataclass(frozen=True, slots=True)
class Rates:
    """The runs with one batch size."""

    batch_size: int
    psgd: list[float]  # gradients per second in each turn
    loops: list[float]  # the same of both loops together
    round_trips_ns: list[float]  # of a message between the cores, before each run
    failures: int

    @property
    def efficiency(self) -> Finding:
        """The ratio of the median rates."""
        return ratio(f"gradients/s of psgd ÷ two separate loops, batches of {self.batch_size}", self.psgd, self.loops)


def main() -> int:
    """Measure, print the table, write document and figure. Return the exit code: 1 if a run failed."""
    made = parser("batch_sizes", __doc__, repeats=5)
    made.add_argument("--seconds", type=float, default=6.0, help="seconds measured in each run (default: %(default)s)")
    made.add_argument("--limit", type=float, default=120.0, help="time limit of a run, in seconds")
    made.add_argument(
        "--sizes", nargs="+", type=int, default=list(BATCH_SIZES), help="batch sizes (default: %(default)s)"
    )
    made.add_argument(
        "--join", action="store_true", help="keep the other batch sizes of the document, to measure a few at a time"
    )
    arguments = made.parse_args()
    begin()
    earlier = _earlier(arguments.out) if arguments.join else []
    found = joined(earlier, _measured(arguments))
    Console().print(table(found))
    settings = {"seconds": arguments.seconds, "repeats": arguments.repeats, "sizes": [one.batch_size for one in found]}
    tree = document(findings(found), settings, [asdict(one) for one in found])
    write(arguments.out, tree)
    _draw(arguments.out.with_suffix(".svg"), tree)
    return int(any(one.failures for one in found))


def _measured(arguments: Namespace) -> list[Rates]:
    outcomes: dict[int, list[Measurement | Failure]] = {size: [] for size in arguments.sizes}
    for turn in range(1, arguments.repeats + 1):
        for size, of_size in outcomes.items():
            for name in (PSGD, LIMIT):
                label = f"{turn}/{arguments.repeats} batches of {size}:"
                options = ("--set", f"data.batch_size={size}")
                of_size.append(run_turn(label, name, arguments.seconds, arguments.limit, options))
    return [rates(size, of_size) for size, of_size in outcomes.items()]


def _earlier(file: Path) -> list[Rates]:
    """Return the rates in a document; an empty list if there is no such file."""
    if not file.exists():
        return []
    return [Rates(**one) for one in json.loads(file.read_text(encoding="utf-8"))["runs"]]


def _draw(file: Path, tree: Mapping[str, Any]) -> None:
    """Write the figure, unless no efficiency could be measured."""
    from psgd.monitoring.plots import svg

    if any(one["psgd"] and one["loops"] for one in tree["runs"]):
        file.write_text(svg(figure(tree)), encoding="utf-8")


def rates(batch_size: int, outcomes: Iterable[Measurement | Failure]) -> Rates:
    """Return the rates of psgd and of the loops with one batch size."""
    by_name = {one.name: one for one in summaries(outcomes)}
    return Rates(
        batch_size,
        by_name[PSGD].rates,
        by_name[LIMIT].rates,
        [time_ns for one in by_name.values() for time_ns in one.round_trips_ns],
        sum(len(one.failures) for one in by_name.values()),
    )


def joined(earlier: Iterable[Rates], later: Iterable[Rates]) -> list[Rates]:
    """Return both by increasing batch size; of a size that both have, the later."""
    by_size = {one.batch_size: one for one in (*earlier, *later)}
    return [by_size[size] for size in sorted(by_size)]


def findings(found: Sequence[Rates]) -> list[Finding]:
    """Return the efficiency with each batch size."""
    return [one.efficiency for one in found]


def table(found: Sequence[Rates]) -> Table:
    """Return a table with one row for each batch size."""
    rows = Table(title="gradients applied per second, by batch size")
    for heading in ("batch size", "psgd", "two loops", "efficiency", "turns", "cores, ns", "failed"):
        rows.add_column(heading, justify="right")
    for one in found:
        efficiency = one.efficiency
        rows.add_row(
            f"{one.batch_size:,}",
            _median(one.psgd),
            _median(one.loops),
            "failed" if efficiency.value is None else f"{efficiency.value:.2f}",
            spread(efficiency),
            _median(one.round_trips_ns),
            str(one.failures),
        )
    return rows


def _median(values: Sequence[float]) -> str:
    return f"{median(values):,.0f}" if values else ""


def figure(tree: Mapping[str, Any]) -> Figure:
    """Draw the efficiency over the batch size, with a band from the least to the most of any turn.

    Args:
        tree: the document of this benchmark.
    """
    from matplotlib.ticker import FixedLocator, NullLocator

    from psgd.monitoring.plots import Curve, curves

    measured = [one for one in (Rates(**run) for run in tree["runs"]) if one.efficiency.value is not None]
    sizes = [one.batch_size for one in measured]
    values = [one.efficiency.value or 0.0 for one in measured]
    turns = [one.efficiency.turns or (value,) for one, value in zip(measured, values, strict=True)]
    psgd = Curve("psgd, async", sizes, values, [min(of) for of in turns], [max(of) for of in turns])
    loops = Curve("two separate loops", sizes, [1.0] * len(sizes))
    drawn = curves([psgd, loops], "examples in a batch", "gradients/s ÷ those of two loops", log_x=True)
    (axes,) = drawn.axes
    axes.set_ylim(0, max(1.1, 1.05 * max(max(of) for of in turns)))
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:,.0f}")
    for one, value in zip(measured, values, strict=True):
        axes.annotate(
            f"{value:.2f}\n{median(one.psgd):,.0f}/s",
            (one.batch_size, value),
            (0, -8),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=9,
            color=INK,
        )
    return drawn


if __name__ == "__main__":
    sys.exit(main())
