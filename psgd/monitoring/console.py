"""The terminal, as all of psgd writes to it: a user's text is text, never markup.

Names, paths and messages may hold `[/b]`, `:smile:` or anything else; style is given by `rich.text.Text` alone.
"""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

__all__ = ["stderr_console", "warn"]


def stderr_console(*, quiet: bool = False) -> Console:
    """Return a console for stderr that prints strings as they are."""
    return Console(stderr=True, quiet=quiet, markup=False, emoji=False, highlight=False)


def warn(text: str) -> None:
    """Print a warning on stderr."""
    stderr_console().print(Text("warning", style="yellow"), text, sep=": ", soft_wrap=True)
