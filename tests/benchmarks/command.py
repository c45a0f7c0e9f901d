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


def parser(name: str, what: str | None, repeats: int = 3) -> ArgumentParser:
    """One that knows `--repeats` and `--out`.

    Args:
        name: of the document, without its ending.
        what: the benchmark's docstring, whose first line is shown.
        repeats: turns, if nobody says otherwise.
    """
    made = ArgumentParser(description=(what or "").partition("\n")[0])
    made.add_argument("--repeats", type=int, default=repeats, help="turns; the figures are medians over them")
    made.add_argument("--out", type=Path, default=Path(f"bench/{name}.json"), help="where the document goes")
    return made


def begin() -> None:
    """Hold this process and all it starts to two cores and one BLAS thread each, and end them with it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:NUM_WORKERS])
    os.environ.update(ONE_THREAD, RAY_USAGE_STATS_ENABLED="0")
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed psgd is compiled once, not in each of its processes


def conclude(title: str, findings: Sequence[Finding], arguments: Namespace, runs: Any) -> int:
    """Print the table and write the document; 1 if something could not be measured.

    Args:
        title: of the table.
        findings: its rows.
        arguments: of the command line: the settings, and where the document goes.
        runs: what the findings were computed from.
    """
    Console().print(table(title, findings))
    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    write(arguments.out, document(findings, settings, runs))
    return int(any(one.value is None for one in findings))


def write(out: Path, tree: Mapping[str, Any]) -> None:
    """The document, in a folder that is made if need be."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
