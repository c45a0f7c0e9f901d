"""The lines on a terminal that name what psgd does before training begins."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from psgd_workers.redaction import printable, redact

__all__ = ["Stages", "is_live"]


def is_live(console: Console) -> bool:
    """Return True if the console can show a live line. FORCE_COLOR does not turn a file into a terminal."""
    is_tty = getattr(console.file, "isatty", None)
    can_move = console.is_interactive and not console.is_dumb_terminal and not console.quiet
    return can_move and is_tty is not None and is_tty()


class Stages:
    """Prints a line for each stage of a start, on a terminal only: other output is for programs.

    Args:
        console: console to print to.
    """

    def __init__(self, console: Console) -> None:
        self._console = console if is_live(console) else None

    def show(self, text: str) -> None:
        """Print the stage that begins now, without the passwords of URLs and without control characters."""
        if self._console is not None:
            self._console.print(Text(printable(redact(text)), style="dim"), soft_wrap=True)
