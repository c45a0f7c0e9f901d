from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from psgd.errors import InputError
from psgd.monitoring.page import Page
from psgd.monitoring.plots import bars

VOID = {"meta", "path", "use", "image", "rect"}  # elements without an end tag


class Reader(HTMLParser):
    """Collects the elements of a page in order and their texts by tag, and checks that all elements are closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1], data.strip()))


def full_page() -> Page:
    page = Page("Modes", "Two modes, one seed.")
    page.add_heading("Time")
    page.add_text("Lower is better.")
    page.add_table(["mode", "time, s", "reached"], [["bsp", 1234.5678, True], ["async", None, False]])
    page.add_figure(bars({"bsp": 2.0, "async": 1.0}, "mode", "seconds"), "Seconds by mode.")
    page.add_figure(bars({"bsp": 3.0, "async": 1.0}, "mode", "updates"), "Updates by mode.")
    return page


def test_a_page_holds_what_was_added_in_its_order() -> None:
    reader = Reader(full_page().html())
    assert not reader.open
    outside = [(tag, text) for tag, text in reader.texts if tag not in {"text", "style"}]
    assert outside == [
        ("title", "Modes"),
        ("h1", "Modes"),
        ("p", "Two modes, one seed."),
        ("h2", "Time"),
        ("p", "Lower is better."),
        ("th", "mode"),
        ("th", "time, s"),
        ("th", "reached"),
        ("td", "bsp"),
        ("td", "1235"),
        ("td", "yes"),
        ("td", "async"),
        ("td", "–"),
        ("td", "no"),
        ("figcaption", "Seconds by mode."),
        ("figcaption", "Updates by mode."),
    ]
    assert {("text", "bsp"), ("text", "seconds"), ("text", "updates")} <= set(reader.texts)
    assert reader.tags.count("svg") == reader.tags.count("figure") == 2
    assert reader.tags.count("tr") == 3


def test_columns_of_numbers_are_set_to_the_right() -> None:
    page = Page("t", "l")
    page.add_table(["name", "count", "flag", "mixed"], [["a", 1, True, 1], ["b", None, False, "x"]])
    right = re.findall(r'<t[hd] class="number">([^<]*)<', page.html())
    assert right == ["count", "1", "–"]


def test_all_text_is_escaped() -> None:
    evil = "<script>alert('&')</script>"
    page = Page(evil, evil)
    page.add_heading(evil)
    page.add_text(evil)
    page.add_table([evil], [[evil]])
    page.add_figure(bars({evil: 1.0}, evil, evil, evil), evil)
    reader = Reader(page.html())
    assert "script" not in reader.tags
    assert [text for _, text in reader.texts].count(evil) == 12


def test_a_page_needs_nothing_from_elsewhere() -> None:
    reader = Reader(full_page().html())
    assert not {"script", "link", "img", "iframe"} & set(reader.tags)
    links = [value for name, value in reader.attributes if name in {"href", "xlink:href", "src"}]
    assert all(value is not None and value.startswith("#") for value in links)
    assert "@import" not in full_page().html()


def test_the_same_page_is_the_same_text() -> None:
    page = full_page()
    assert page.html() == page.html() == full_page().html()


def test_dark_and_light_are_both_served() -> None:
    assert "@media (prefers-color-scheme: dark)" in full_page().html()


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(InputError, match=r"a table of 2 columns got a row of 3: \[1, 2, 3\]"):
        Page("t", "l").add_table(["a", "b"], [[1, 2], [1, 2, 3]])


def test_a_table_may_be_empty() -> None:
    page = Page("t", "l")
    page.add_table(["a"], [])
    assert ("th", "a") in Reader(page.html()).texts
