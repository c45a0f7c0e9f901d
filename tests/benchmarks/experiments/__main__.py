"""Run published experiments on virtual time: `python -m tests.benchmarks.experiments`, from the repository's root.

It prints which claims hold, and writes a page, the figures and a document of all results. The exit code is 1 if a claim
fails.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from inspect import cleandoc
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple, Protocol

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from psgd.monitoring.page import Page
from psgd.monitoring.plots import svg
from tests.benchmarks.experiments import laws, minibatch, ringmaster, staleness
from tests.benchmarks.experiments.runs import Claim

__all__ = ["main"]


class Experiment(Protocol):
    """A module of one experiment. Its docstring has the claim as the first sentence, then the paper and the setting."""

    def run(self, seeds: Sequence[int]) -> list[Any]:
        """Return the results of these seeds, as dataclasses."""

    def claims(self, results: Sequence[Any]) -> list[Claim]:
        """Return the paper's claims beside the observed values."""

    def figure(self, results: Sequence[Any]) -> Figure:
        """Draw the results."""


EXPERIMENTS: Mapping[str, Experiment] = {
    "staleness": staleness,
    "ringmaster": ringmaster,
    "minibatch": minibatch,
    "laws": laws,
}


class Done(NamedTuple):
    """The outcome of one experiment."""

    results: list[Any]
    claims: list[Claim]
    figure: Figure
    seconds: float  # of real time


def main() -> int:
    """Run all experiments, print the table, write the files. Return the exit code: 1 if a claim fails."""
    arguments = _arguments()
    console = Console()
    done: dict[str, Done] = {}
    for name, experiment in EXPERIMENTS.items():
        done[name] = _run(experiment, range(arguments.seeds))
        console.print(f"{name} took {done[name].seconds:.0f} s", highlight=False)
    console.print(_table(done))
    _write(arguments.out, done, arguments.seeds)
    console.print(f"see {arguments.out / 'index.html'}", highlight=False)
    return int(not all(claim.holds for one in done.values() for claim in one.claims))


def _arguments() -> Namespace:
    parser = ArgumentParser(description="Run published experiments on the production core and virtual time.")
    parser.add_argument(
        "--seeds", type=int, default=5, help="runs of each setting, with seeds from 0 (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("bench/experiments"),
        help="folder for the page, the figures and the document (default: %(default)s)",
    )
    return parser.parse_args()


def _run(experiment: Experiment, seeds: Sequence[int]) -> Done:
    began = monotonic()
    results = experiment.run(seeds)
    return Done(results, experiment.claims(results), experiment.figure(results), monotonic() - began)


def _table(done: Mapping[str, Done]) -> Table:
    table = Table(title="published results on virtual time")
    for title in ("experiment", "claim", "observed", "holds"):
        table.add_column(title)
    for name, one in done.items():
        for claim in one.claims:
            table.add_row(name, claim.text, claim.observed, "yes" if claim.holds else "[bold red]no[/]")
    return table


def _write(out: Path, done: Mapping[str, Done], seeds: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, one in done.items():
        (out / f"{name}.svg").write_text(svg(one.figure), encoding="utf-8")
    (out / "index.html").write_text(_page(done, seeds), encoding="utf-8")
    (out / "experiments.json").write_text(json.dumps(_document(done, seeds), indent=2) + "\n", encoding="utf-8")


def _page(done: Mapping[str, Done], seeds: int) -> str:
    page = Page("Published results on virtual time", f"The production core on a virtual clock; seeds 0 to {seeds - 1}.")
    for name, one in done.items():
        heading, *paragraphs = cleandoc(EXPERIMENTS[name].__doc__ or "").split("\n\n")
        page.add_heading(heading.rstrip("."))
        for paragraph in paragraphs:
            page.add_text(" ".join(paragraph.split()))
        page.add_table(("claim", "observed", "holds"), one.claims)
        page.add_figure(one.figure, cleandoc(EXPERIMENTS[name].figure.__doc__ or ""))
    return page.html()


def _document(done: Mapping[str, Done], seeds: int) -> dict[str, Any]:
    return {
        "seeds": seeds,
        "experiments": {
            name: {
                "claims": [claim._asdict() for claim in one.claims],
                "results": [asdict(result) for result in one.results],
            }
            for name, one in done.items()
        },
    }


if __name__ == "__main__":
    sys.exit(main())
