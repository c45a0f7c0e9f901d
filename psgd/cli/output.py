"""Output of the commands: JSON on stdout, tables and summaries on stderr."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import typer

from psgd_workers.counting import counted
from psgd_workers.redaction import printable, redact

if TYPE_CHECKING:
    from psgd.result import Result
    from psgd.simulation.verify import Check

__all__ = ["print_checks", "print_json", "print_result"]

COLOURS = {"failed": "red", "unsaved": "red", "interrupted": "yellow"}
SUMMARY = {  # title -> metric and format
    "validation accuracy": ("val/accuracy", "{:.4f}"),
    "validation loss": ("val/loss", "{:.4f}"),
    "validated at epoch": ("val/epoch", "{:.4g}"),
    "training loss": ("train/loss", "{:.4f}"),
    "updates/s": ("perf/updates_per_s", "{:.0f}"),
    "staleness, mean": ("async/staleness_mean", "{:.2f}"),
}


def print_json(value: Any, indent: int | None = None) -> None:
    """Print one JSON document on stdout, without the passwords of URLs."""
    from psgd.jsontext import to_json

    typer.echo(redact(to_json(value, indent=indent)))


def print_result(result: Result) -> None:
    """Print a summary of how a run ended, on stderr."""
    from rich.text import Text

    from psgd.monitoring.console import stderr_console

    console = stderr_console()
    status = Text(result.status, style=f"bold {COLOURS.get(result.status, 'green')}")
    progress = f"{counted(result.epochs, 'epoch')}, {counted(result.updates, 'update')} in {result.duration_s:.1f} s"
    console.print(status, f"{result.name}: {progress}", soft_wrap=True)
    for title, (metric, template) in SUMMARY.items():
        if (value := result.metrics.get(metric)) is not None:
            console.print(f"  {title:<20} {template.format(value)}")
    console.print(f"  {'run directory':<20} {printable(redact(result.path))}", soft_wrap=True)
    if result.error:
        console.print(f"  {'error':<20} {printable(redact(result.error))}", soft_wrap=True)
    if result.status in ("interrupted", "stopped"):
        console.print("  the same command with --resume continues it")


def print_checks(checks: Iterable[Check]) -> None:
    """Print the results of `psgd verify` as a table, on stderr."""
    from rich.table import Table
    from rich.text import Text

    from psgd.monitoring.console import stderr_console

    table = Table("", "promised", "observed", "")
    for check in checks:
        verdict = Text("holds", style="green") if check.holds else Text("does not hold", style="red")
        table.add_row(check.name, check.promised, check.observed, verdict)
    stderr_console().print(table)
