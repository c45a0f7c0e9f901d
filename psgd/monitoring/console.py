"""The console on stderr, which prints users' text as it is and never as markup.

Names, paths and messages may contain `[/b]` or `:smile:`, so styles are given only by `rich.text.Text`.
"""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from psgd_workers.redaction import printable, redact

__all__ = ["stderr_console", "warn"]


def stderr_console(*, quiet: bool = False) -> Console:
    """Return a console for stderr that prints strings as they are."""
    return Console(stderr=True, quiet=quiet, markup=False, emoji=False, highlight=False)


def warn(text: str) -> None:
    """Print a warning on stderr, without the passwords of URLs and without control characters."""
    stderr_console().print(Text("warning", style="yellow"), printable(redact(text)), sep=": ", soft_wrap=True)
