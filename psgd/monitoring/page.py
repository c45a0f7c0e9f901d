"""A self-contained HTML page: no scripts, and no requests to a network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from psgd.errors import InputError
from psgd.monitoring.plots import svg
from psgd_workers.counting import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Page"]

CSS = """
:root { color-scheme: light dark; --ink: #222; --muted: #666; --line: #ddd; --ground: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --muted: #a0a0a0; --line: #3a3a3a; --ground: #16181b; } }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 832px; margin: 0 auto; padding: 32px 16px 64px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0; }
h2 { font-size: 19px; margin: 40px 0 8px; }
.lead { font-size: 17px; color: var(--muted); margin: 8px 0 24px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 16px 0; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 16px 5px 0; border-bottom: 1px solid var(--line); text-align: left; }
th { color: var(--muted); font-weight: 600; }
.number { text-align: right; }
figure { margin: 24px 0; }
figure svg { display: block; box-sizing: border-box; width: 100%; height: auto; padding: 12px;
  background: #fff; border: 1px solid var(--line); border-radius: 6px; }
figcaption { margin-top: 6px; font-size: 14px; color: var(--muted); }
"""


class Page:
    """A page that is built from top to bottom. All text is escaped.

    Args:
        title: heading and window title.
        lead: sentence below the heading that says what the page shows.
    """

    def __init__(self, title: str, lead: str) -> None:
        self._title = title
        self._parts = [_element("h1", title), f'<p class="lead">{escape(lead)}</p>']

    def add_heading(self, text: str) -> None:
        """Begin a section."""
        self._parts.append(_element("h2", text))

    def add_text(self, text: str) -> None:
        """Add a paragraph."""
        self._parts.append(_element("p", text))

    def add_table(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Add a table. Columns that hold only numbers and None (shown as a dash) are right-aligned.

        Raises:
            InputError: a row is not as long as `columns`.
        """
        for row in rows:
            if len(row) != len(columns):
                raise InputError(f"a table of {counted(len(columns), 'column')} got a row of {len(row)}: {list(row)}")
        numeric = [all(_is_number(row[i]) or row[i] is None for row in rows) for i in range(len(columns))]
        body = [_row("td", [_cell_text(value) for value in row], numeric) for row in rows]
        table = ["<table><thead>", _row("th", columns, numeric), "</thead><tbody>", *body, "</tbody></table>"]
        self._parts.append('<div class="wide">' + "\n".join(table) + "</div>")

    def add_figure(self, figure: Figure, caption: str) -> None:
        """Add a plot with a caption below it."""
        self._parts.append(f"<figure>{svg(figure)}{_element('figcaption', caption)}</figure>")

    def html(self) -> str:
        """Return the page as HTML."""
        head = [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"{_element('title', self._title)}\n<style>{CSS}</style>\n</head>\n<body>\n<main>",
        ]
        return "\n".join([*head, *self._parts, "</main>\n</body>\n</html>\n"])


def _element(tag: str, text: str) -> str:
    return f"<{tag}>{escape(text)}</{tag}>"


def _row(tag: str, cells: Sequence[str], numeric: Sequence[bool]) -> str:
    attributes = [' class="number"' if number else "" for number in numeric]
    elements = (f"<{tag}{each}>{escape(cell)}</{tag}>" for each, cell in zip(attributes, cells, strict=True))
    return f"<tr>{''.join(elements)}</tr>"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell_text(value: object) -> str:
    """Return the text of a cell. Floats get four significant digits."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
