from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from matplotlib import rcParams
from matplotlib.figure import Figure

from psgd.errors import InputError, MissingExtraError
from psgd.monitoring.plots import COLOURS, Curve, bars, curves, histogram, svg

NAN = float("nan")
INF = float("inf")


def two_curves() -> Figure:
    falling = Curve("async", [1, 2, 3], [0.9, 0.5, 0.1], [0.8, 0.4, 0.05], [1.0, 0.6, 0.2])
    return curves([falling, Curve("bsp", [1, 2, 3], [0.9, 0.7, 0.6])], "epoch", "loss", title="Loss by mode")


def texts(figure: Figure) -> list[str]:
    """Return all texts of the figure as it appears on a page."""
    root = ET.fromstring(svg(figure))  # noqa: S314 (our own text)
    return ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


FIGURES: dict[str, Callable[[], Figure]] = {
    "curves": two_curves,
    "logarithmic curves": lambda: curves([Curve("a", [1, 10, 1000], [1, 0, 0.001])], "n", "y", True, True),
    "histogram": lambda: histogram({0: 3, 4: 1}, "staleness", "gradients", "Staleness"),
    "bars": lambda: bars({"worker-0": 0.25, "worker-1": 0.75}, "worker", "share", "Who did the work"),
    "many bars": lambda: bars({f"worker-{i}": 1 / 200 for i in range(200)}, "worker", "share"),
}
each_figure = pytest.mark.parametrize("name", FIGURES)


@each_figure
def test_the_same_figure_is_the_same_text(name: str) -> None:
    figure = FIGURES[name]()
    first = svg(figure)
    assert [svg(figure) for _ in range(3)] == [first] * 3
    assert svg(FIGURES[name]()) == first
    assert "date" not in first.lower()


@each_figure
def test_a_figure_is_one_svg_element_800_px_wide(name: str) -> None:
    text = svg(FIGURES[name]())
    assert text.startswith("<svg")
    root = ET.fromstring(text)  # noqa: S314 (our own text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.attrib["width"] == "600pt"


@each_figure
def test_drawing_leaves_matplotlibs_settings_alone(name: str) -> None:
    before = rcParams.copy()
    svg(FIGURES[name]())
    assert rcParams.copy() == before


def test_only_ids_that_are_referred_to_are_left() -> None:
    text = svg(two_curves())
    ids = [element.attrib["id"] for element in ET.fromstring(text).iter() if "id" in element.attrib]  # noqa: S314
    assert ids
    assert all(f"#{identifier}" in text for identifier in ids)
    assert len(ids) == len(set(ids))


def test_labels_are_words_in_the_svg() -> None:
    assert {"async", "bsp", "epoch", "loss", "Loss by mode", "1", "2", "3"} <= set(texts(two_curves()))
    assert {"staleness", "gradients", "mean 1"} <= set(texts(FIGURES["histogram"]()))
    assert {"worker-0", "worker-1", "0.25", "0.75", "worker", "share"} <= set(texts(FIGURES["bars"]()))
    assert "worker, 1 to 200 in order" in texts(FIGURES["many bars"]())


def test_the_legend_lists_curves_as_they_end() -> None:
    ends = {"low": 0.1, "diverged": NAN, "high": 0.9, "middle": 0.5}
    figure = curves([Curve(name, [1, 2], [1, end]) for name, end in ends.items()], "x", "y")
    assert legend(figure) == ["diverged", "high", "middle", "low"]  # it ends at 1, where it was last finite


def test_curves_are_told_apart_beyond_the_colours() -> None:
    lines = curves([Curve(f"{i}", [0, 1], [0, i]) for i in range(3 * len(COLOURS))], "x", "y").axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 3 * len(COLOURS)


def test_what_cannot_be_drawn_leaves_a_gap() -> None:
    figure = curves([Curve("a", [0, 1, 2, 3, 4], [1, INF, NAN, 0, 2])], "x", "y", log_y=True)
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), [1, NAN, NAN, NAN, 2])
    svg(figure)


def test_logarithmic_axes_have_plain_numbers() -> None:
    assert {"0.001", "0.01", "0.1", "1", "10", "100", "1000"} <= set(texts(FIGURES["logarithmic curves"]()))


@pytest.mark.parametrize(
    ("series", "log"),
    [
        ([], False),
        ([Curve("a", [], [])], False),
        ([Curve("a", [1, 2], [NAN, INF])], False),
        ([Curve("a", [0], [-1])], True),
    ],
)
def test_curves_without_a_point_are_refused(series: list[Curve], log: bool) -> None:
    with pytest.raises(InputError, match=f"nothing to plot over 'epoch': no point of {len(series)} curves is finite"):
        curves(series, "epoch", "loss", log_y=log)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Curve("a", [1, 2], [1]),
        lambda: Curve("a", [1], [1], [1]),
        lambda: Curve("a", [1], [1], [1, 2], [1, 2]),
        lambda: Curve("a", [[1]], [[1]]),
    ],
)
def test_curves_of_unequal_lengths_are_refused(make: Callable[[], Curve]) -> None:
    with pytest.raises(InputError, match="curve 'a' needs x and y, and both or none of low and high"):
        make()


def test_a_histogram_counts_each_number() -> None:
    figure = histogram({3: 5, 0: 2, 7: 0, 1: 1}, "staleness", "gradients")
    heights = [patch.get_height() for patch in figure.axes[0].patches]  # type: ignore[attr-defined]
    assert heights == [2, 1, 0, 5]
    assert "mean 2" in texts(figure)


def test_a_wide_histogram_loses_nothing_in_its_bins() -> None:
    numbers = {int(number): 1 + int(number) % 3 for number in np.random.default_rng(0).integers(5, 5000, 900)}
    figure = histogram(numbers, "staleness", "gradients")
    heights = [patch.get_height() for patch in figure.axes[0].patches]  # type: ignore[attr-defined]
    assert sum(heights) == sum(numbers.values())
    assert heights[0] == sum(times for number, times in numbers.items() if number < 100)
    assert "staleness (in bins of 100)" in texts(figure)


@pytest.mark.parametrize("counts", [{}, {3: 0}])
def test_a_histogram_of_nothing_is_refused(counts: dict[int, int]) -> None:
    with pytest.raises(InputError, match="nothing was counted"):
        histogram(counts, "staleness", "gradients")


def test_bars_are_in_the_order_given_and_unknown_ones_stay() -> None:
    figure = bars({"z": 3.0, "never": INF, "a": 1.5}, "mode", "seconds")
    assert [patch.get_width() for patch in figure.axes[0].patches] == [3.0, 0.0, 1.5]  # type: ignore[attr-defined]
    assert [label for label in texts(figure) if label in {"z", "never", "a"}] == ["z", "never", "a"]
    assert "–" in texts(figure)


@pytest.mark.parametrize("values", [{}, {"a": NAN}])
def test_bars_without_a_value_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"nothing to plot for 'seconds': none of {len(values)} values is finite"):
        bars(values, "mode", "seconds")


def test_labels_are_shown_as_given_and_long_ones_cut() -> None:
    names = ["$5 or $6", "<b>&", "_hidden", "x" * 200]
    for figure in (
        curves([Curve(name, [1], [1]) for name in names], "x", "y"),
        bars(dict.fromkeys(names, 1.0), "n", "v"),
    ):
        assert {*names[:3], "x" * 39 + "…"} <= set(texts(figure))


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "psgd.monitoring.plots")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'psgd\[plots\]'"):
        importlib.import_module("psgd.monitoring.plots")
