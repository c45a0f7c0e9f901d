"""Figures from plain data, as matplotlib objects. pyplot is not used, so there is no global state.

Figures are 800 px wide, in colours that colour-blind readers can tell apart (Okabe and Ito, 2008, without yellow).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import count
from math import isfinite
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from psgd.errors import InputError, MissingExtraError

try:
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogFormatterSciNotation, MaxNLocator
except ModuleNotFoundError as error:
    raise MissingExtraError("plots need matplotlib, which is not installed: pip install 'psgd[plots]'") from error

__all__ = ["Curve", "bars", "curves", "histogram", "svg"]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES = ("-", "--", ":")  # the next style is used after the last colour
INK = "#222222"
MUTED = "#555555"
GRID = "#e4e4e4"

PX = 1 / 96  # inches per pixel
WIDTH = 800 * PX
HEIGHT = 400 * PX
BAR_HEIGHT = 28 * PX
LONGEST_LABEL = 40  # characters
MAX_MARKED_POINTS = 16  # a curve of at most this many points shows a dot at each
MAX_NAMED_BARS = 32  # at most this many bars show their names and values
LEAST_BINS = 12  # the axis has room for this many bins, so that a few bins stay narrow
MAX_BINS = 64  # a wider range gets wider bins


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a plot."""

    label: str
    x: ArrayLike  # [points]
    y: ArrayLike  # [points]; a value that is not finite leaves a gap
    low: ArrayLike | None = None  # [points], lower edge of a band around the line; given together with `high`
    high: ArrayLike | None = None  # [points], upper edge of the band

    def __post_init__(self) -> None:
        given = {name: values for name in ("x", "y", "low", "high") if (values := getattr(self, name)) is not None}
        shapes = {name: np.shape(values) for name, values in given.items()}
        if len(shapes) == 3 or len(shapes["x"]) != 1 or len(set(shapes.values())) > 1:
            raise InputError(
                f"curve {self.label!r} needs x and y, and both or none of low and high, of equal lengths, not {shapes}"
            )


class _PlainNumbers(LogFormatterSciNotation):
    """Formatter of a logarithmic axis that writes 0.1 in place of 10⁻¹."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def curves(
    series: Sequence[Curve],
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    title: str | None = None,
) -> Figure:
    """Draw lines, with a legend beside them in the order of the lines' last values, highest first.

    Raises:
        InputError: no point can be drawn, because none is finite and, on a logarithmic axis, above 0.
    """
    figure, axes = _figure(HEIGHT, x_label, y_label, title)
    ends = [_line(axes, number, curve, log_x, log_y) for number, curve in enumerate(series)]
    if not any(isfinite(end) for end, _ in ends):
        above = " and above 0 where its axis is logarithmic" if log_x or log_y else ""
        raise InputError(f"nothing to plot over {x_label!r}: no point of {len(series)} curves is finite{above}")
    if log_x:
        axes.set_xscale("log")
        _plain_numbers(axes.xaxis)
    elif all(np.array_equal(x := np.asarray(curve.x, float), np.rint(x)) for curve in series):
        axes.xaxis.set_major_locator(_whole_numbers())
    if log_y:
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis)
    lines = [line for _, line in sorted(ends, key=lambda end: -end[0])]
    figure.legend(handles=lines, loc="outside right upper", frameon=False, labelcolor=INK)
    return _laid_out(figure)


def histogram(counts: Mapping[int, int], x_label: str, y_label: str, title: str | None = None) -> Figure:
    """Draw how often each whole number occurred, and their mean. A bin holds several numbers if their range is wide.

    Raises:
        InputError: all counts are 0.
    """
    numbers, times = _counted(counts)
    if not len(numbers):
        raise InputError(f"nothing to plot over {x_label!r}: nothing was counted")
    width = _bin_width(int(numbers.max() - numbers.min()) + 1)
    edges = np.arange(numbers.min() // width, numbers.max() // width + 2) * width  # a bin is [edge, next edge)
    heights, _ = np.histogram(numbers, edges - 0.5, weights=times)
    figure, axes = _figure(HEIGHT, x_label if width == 1 else f"{x_label} (in bins of {width})", y_label, title)
    axes.bar(edges[:-1] + (width - 1) / 2, heights, 0.9 * width, color=COLOURS[0])
    axes.set_xlim(edges[0] - width, max(edges[-1], edges[0] + LEAST_BINS * width))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(_whole_numbers())
    axes.grid(visible=False, axis="x")
    mean = float(np.average(numbers, weights=times))
    axes.axvline(mean, color=INK, linewidth=1, linestyle="--")
    axes.annotate(
        f"mean {mean:.4g}", (mean, 1), (4, -2), ("data", "axes fraction"), "offset points", va="top", color=INK
    )
    return _laid_out(figure)


def bars(values: Mapping[str, float], name_label: str, value_label: str, title: str | None = None) -> Figure:
    """Draw a bar for each name, in the order given. More than `MAX_NAMED_BARS` bars are numbered instead of named.

    Raises:
        InputError: there is no finite value.
    """
    if not any(isfinite(value) for value in values.values()):
        raise InputError(f"nothing to plot for {value_label!r}: none of {len(values)} values is finite")
    lengths = [value if isfinite(value) else 0.0 for value in values.values()]
    if len(values) > MAX_NAMED_BARS:
        figure, axes = _figure(HEIGHT, f"{name_label}, 1 to {len(values)} in order", value_label, title)
        axes.stairs(lengths, np.arange(len(lengths) + 1) + 0.5, fill=True, color=COLOURS[0])
        axes.grid(visible=False, axis="x")
        return _laid_out(figure)
    figure, axes = _figure((len(values) + 3) * BAR_HEIGHT, value_label, name_label, title)
    drawn = axes.barh(range(len(values)), lengths, 0.7, color=COLOURS[0])
    shown = [f"{value:.4g}" if isfinite(value) else "–" for value in values.values()]
    axes.bar_label(drawn, shown, padding=4, color=INK, fontsize=9)
    axes.set_yticks(range(len(values)), [_label(name) for name in values])
    axes.invert_yaxis()  # first bar on top
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.1)  # room for the values beside the bars
    return _laid_out(figure)


def svg(figure: Figure) -> str:
    """Return the figure as SVG for an HTML page. The same figure gives the same text."""
    file = StringIO()
    with rc_context({"svg.hashsalt": "psgd", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = file.getvalue()
    text = text[text.index("<svg") :]  # without the XML declaration, which a page must not contain
    # Two figures on a page would share ids such as "axes_1". Only ids that are referred to are kept: they are hashes.
    referred = set(re.findall(r"#([\w-]+)", text))
    return re.sub(r'(<\w+) id="([^"]*)"', lambda found: found[0] if found[2] in referred else found[1], text)


def _figure(height: float, x_label: str, y_label: str, title: str | None) -> tuple[Figure, Axes]:
    """Return an empty plot in the common style."""
    figure = Figure((WIDTH, height), 1 / PX, facecolor="white", layout="constrained")
    axes = figure.add_subplot(facecolor="white")
    axes.set_xlabel(_label(x_label), color=INK)
    axes.set_ylabel(_label(y_label), color=INK)
    if title:
        axes.set_title(_label(title, 90), loc="left", color=INK, fontsize=12, pad=12)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", color=GRID, labelcolor=MUTED, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    return figure, axes


def _laid_out(figure: Figure) -> Figure:
    """Lay the figure out once. Another layout at each drawing would round positions anew, and change the SVG's ids."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def _whole_numbers() -> MaxNLocator:
    return MaxNLocator(steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)


def _plain_numbers(axis: Axis) -> None:
    axis.set_major_formatter(_PlainNumbers())
    axis.set_minor_formatter(_PlainNumbers())


def _line(axes: Axes, number: int, curve: Curve, log_x: bool, log_y: bool) -> tuple[float, Line2D]:
    """Draw a curve. Return the height of its end (-inf if it has no drawable point) and its line."""
    x = np.asarray(curve.x, float)
    y = np.asarray(curve.y, float)
    drawable = np.isfinite(x) & np.isfinite(y) & ((x > 0) | (not log_x)) & ((y > 0) | (not log_y))
    colour = COLOURS[number % len(COLOURS)]
    dash = DASHES[number // len(COLOURS) % len(DASHES)]
    marker: Literal["o", ""] = "o" if drawable.sum() <= MAX_MARKED_POINTS else ""
    (line,) = axes.plot(
        x,
        np.where(drawable, y, np.nan),
        label=_label(curve.label),
        color=colour,
        linestyle=dash,
        linewidth=1.8,
        marker=marker,
        markersize=4,
    )
    if curve.low is not None and curve.high is not None:
        low = np.asarray(curve.low, float)
        high = np.asarray(curve.high, float)
        axes.fill_between(x, low, high, where=drawable, color=colour, alpha=0.15, linewidth=0)
    return (float(y[drawable][-1]) if drawable.any() else float("-inf")), line


def _bin_width(span: int) -> int:
    """Return the smallest width among 1, 2, 5, 10, 20, ... for which `MAX_BINS` bins cover `span` numbers."""
    return next(width for power in count() for step in (1, 2, 5) if span <= MAX_BINS * (width := step * int(10**power)))


def _counted(counts: Mapping[int, int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the numbers that occurred, and how often each occurred."""
    pairs = [(number, times) for number, times in counts.items() if times > 0]
    numbers, times = np.array(pairs, np.int64).reshape(-1, 2).T
    return numbers, times


def _label(text: str, longest: int = LONGEST_LABEL) -> str:
    """Return a text of at most `longest` characters, with dollar signs escaped, which would begin a formula."""
    return (text if len(text) <= longest else text[: longest - 1] + "…").replace("$", r"\$")
