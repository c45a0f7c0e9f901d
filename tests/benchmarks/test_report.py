"""Tests of the report on made-up runs."""

from __future__ import annotations

import json
from io import StringIO

from rich.console import Console

from tests.benchmarks.contender import Failure
from tests.benchmarks.measurement import Measurement
from tests.benchmarks.report import document, findings, summaries, table


def run(name: str, rate: float, **details: float) -> Measurement:
    return Measurement(name, rate, 100, 1.0, 0.9, details)


OUTCOMES: list[Measurement | Failure] = [
    run("psgd_job", 800),
    run("hogwild", 400),
    run("psgd_job", 900),
    Failure("hogwild", "it broke"),
]


def test_runs_are_gathered_by_contender() -> None:
    assert [(one.name, one.rates, len(one.failures)) for one in summaries(OUTCOMES)] == [
        ("psgd_job", [800, 900], 0),
        ("hogwild", [400], 1),
    ]


def test_psgd_is_compared_with_each_of_the_others_by_medians() -> None:
    (finding,) = findings(summaries(OUTCOMES))
    assert (finding.value, finding.at_least, finding.met) == (850 / 400, 1.1, True)


def test_parts_of_psgd_are_compared_with_the_limit() -> None:
    (finding,) = findings(summaries([run("psgd_bare", 900), run("own_loops", 1000)]))
    assert (finding.value, finding.at_least, finding.met) == (0.9, 0.93, False)


def test_without_psgd_nothing_is_compared() -> None:
    assert findings(summaries([run("hogwild", 400)])) == []


def test_the_document_has_every_contender_and_counts_failures() -> None:
    tree = document(summaries(OUTCOMES), {})
    psgd, hogwild = tree["runs"]
    assert psgd["updates_per_s"] == {"median": 850, "min": 800, "max": 900}
    assert (psgd["failures"], hogwild["failures"]) == (0, 1)
    assert [finding["value"] for finding in tree["findings"]] == [850 / 400]


def test_the_document_has_the_times_of_messages_between_the_cores_if_there_are_any() -> None:
    apart = [run("psgd_job", 800, round_trip_ns=time_ns) for time_ns in (120.0, 400.0, 410.0)]
    psgd, hogwild = document(summaries([*apart, run("hogwild", 400)]), {})["runs"]
    assert psgd["round_trip_ns"] == {"median": 400, "min": 120, "max": 410}
    assert hogwild["round_trip_ns"] is None


def test_a_contender_without_a_run_has_no_figures() -> None:
    tree = json.loads(json.dumps(document(summaries([Failure("psgd_job", "it broke"), run("hogwild", 400)]), {})))
    assert tree["runs"][0]["updates_per_s"] is None
    assert [finding["value"] for finding in tree["findings"]] == [None]


def test_the_table_shows_each_contender_in_a_row() -> None:
    console = Console(file=StringIO(), width=200, record=True)
    console.print(table(summaries([*OUTCOMES, Failure("ddp_gloo", "it broke")])))
    rows = console.export_text().splitlines()
    assert any("PyTorch Hogwild" in row and "400" in row and "2.12 ×" in row and "≥ 1.1" in row for row in rows)
    assert any("PyTorch DDP" in row and "failed" in row for row in rows)
