"""Tests of figures, their targets, and their form in tables and documents."""

from __future__ import annotations

import json
from io import StringIO

import pytest
from rich.console import Console

from tests.benchmarks.findings import Finding, document, ratio, shown, spread, table, target, verdict


@pytest.mark.parametrize(
    ("finding", "met"),
    [
        (Finding("speed", 0.9, at_least=0.9), True),
        (Finding("speed", 0.8, at_least=0.9), False),
        (Finding("cost", 1.5, at_most=1.5), True),
        (Finding("cost", 1.6, at_most=1.5), False),
        (Finding("speed", 1.0), None),
        (Finding("speed", None, at_least=0.9), None),
    ],
)
def test_a_target_is_met_from_its_bound_on(finding: Finding, met: bool | None) -> None:
    assert finding.met is met


def test_a_ratio_is_one_of_medians_with_that_of_each_turn() -> None:
    assert ratio("speed", [1.0, 2.0, 6.0], [1.0, 4.0, 2.0], at_least=0.5) == Finding(
        "speed", 1.0, "×", at_least=0.5, turns=(1.0, 0.5, 3.0)
    )


def test_turns_that_failed_leave_a_ratio_without_turns() -> None:
    assert ratio("speed", [2.0], [1.0, 1.0]) == Finding("speed", 2.0, "×")


def test_a_ratio_to_nothing_was_not_measured() -> None:
    finding = ratio("speed", [1.0], [], at_least=0.5)
    assert (finding.value, shown(finding), verdict(finding)) == (None, "failed", "no")


def test_a_finding_survives_the_document() -> None:
    finding = Finding("speed", 0.9, "×", at_least=0.5, turns=(0.8, 1.0))
    tree = json.loads(json.dumps(document([finding], {"repeats": 2}, {"speed": [0.8, 1.0]})))
    assert Finding.of_dict(tree["findings"][0]) == finding
    assert (tree["settings"], tree["runs"]) == ({"repeats": 2}, {"speed": [0.8, 1.0]})
    assert tree["findings"][0]["met"] is True


@pytest.mark.parametrize(
    ("value", "text"),
    [(20480.4, "20,480 /s"), (0.0, "0 /s"), (0.12345, "0.123 /s"), (354.2, "354 /s"), (-6.78, "-6.78 /s")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert shown(Finding("rate", value, "/s")) == text


def test_a_table_says_target_figure_turns_and_verdict() -> None:
    finding = Finding("speed", 0.8, "×", at_least=0.9, turns=(0.7, 0.9))
    assert (target(finding), spread(finding), verdict(finding)) == ("≥ 0.9", "0.7 to 0.9", "no")
    console = Console(file=StringIO(), width=200, record=True)
    console.print(table("speeds", [finding, Finding("cost", 3.0, "µs")]))
    rows = console.export_text().splitlines()
    assert any(all(cell in row for cell in ("speed", "≥ 0.9", "0.8 ×", "0.7 to 0.9", "no")) for row in rows)
    assert any("cost" in row and "3 µs" in row for row in rows)
