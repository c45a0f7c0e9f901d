"""The picture of a run in the README, without fonts or anything else that a reader's browser would have to fetch.

Usage: `psgd train JOB 2>&1 | python -m tests.benchmarks.terminal_picture "psgd train JOB"` writes `.github/run.svg`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

__all__ = ["picture"]

WIDTH = 124  # columns
HEAD = 5  # lines of output before the cut
TAIL = 10  # lines after it
FILE = Path(__file__).parents[2] / ".github" / "run.svg"


def picture(command: str, lines: list[str]) -> str:
    """Return an SVG of a terminal that shows a command and the first and last lines of its output."""
    console = Console(record=True, width=WIDTH, file=sys.stderr, force_terminal=True, color_system="truecolor")
    console.print(Text(f"$ {command}", style="bold"))
    shown = [*lines[:HEAD], "...", *lines[-TAIL:]] if len(lines) > HEAD + TAIL else lines
    for line in shown:
        console.print(Text(line, no_wrap=True, overflow="ellipsis"))
    svg = console.export_svg(title="psgd", theme=MONOKAI, unique_id="psgd")
    return re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)


if __name__ == "__main__":
    FILE.write_text(picture(sys.argv[1], sys.stdin.read().splitlines()) + "\n", encoding="utf-8")
