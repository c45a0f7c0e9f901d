"""The command line that all benchmarks share."""

from __future__ import annotations

import json
import os
import signal
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.benchmarks.findings import Finding, document, table
from tests.benchmarks.process_group import ONE_THREAD
from tests.benchmarks.setting import NUM_WORKERS

__all__ = ["begin", "conclude", "parser", "write"]


def parser(name: str, description: str | None, repeats: int = 3) -> ArgumentParser:
    """Return a parser with the options `--repeats` and `--out`.

    Args:
        name: name of the document, without its ending.
        description: the benchmark's docstring; the first line is shown.
        repeats: default number of turns.
    """
    made = ArgumentParser(description=(description or "").partition("\n")[0])
    made.add_argument(
        "--repeats", type=int, default=repeats, help="turns; figures are medians over turns (default: %(default)s)"
    )
    made.add_argument(
        "--out", type=Path, default=Path(f"bench/{name}.json"), help="file of the results, JSON (default: %(default)s)"
    )
    return made


def begin() -> None:
    """Restrict this process and its children to two cores and one BLAS thread each; make SIGTERM end them all."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:NUM_WORKERS])
    os.environ.update(ONE_THREAD, RAY_USAGE_STATS_ENABLED="0")
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed psgd is compiled once, not in each of its processes


def conclude(title: str, findings: Sequence[Finding], arguments: Namespace, runs: Any) -> int:
    """Print the table and write the document. Return the exit code: 1 if a figure could not be measured.

    Args:
        title: title of the table.
        findings: rows of the table.
        arguments: arguments of the command line; all but `out` are recorded as settings.
        runs: measurements that the findings were computed from.
    """
    Console().print(table(title, findings))
    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    write(arguments.out, document(findings, settings, runs))
    return int(any(one.value is None for one in findings))


def write(out: Path, tree: Mapping[str, Any]) -> None:
    """Write a document as JSON, and make its folder if it is missing."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
