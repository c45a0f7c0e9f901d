"""What the runs come to."""

from __future__ import annotations

import json
from io import StringIO

from rich.console import Console

from tests.benchmarks.contender import Failure
from tests.benchmarks.measurement import Measurement
from tests.benchmarks.report import document, summaries, table


def run(name: str, rate: float) -> Measurement:
    return Measurement(name, rate, 100, 1.0, 0.9)


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


def test_the_document_compares_medians_and_counts_failures() -> None:
    psgd, hogwild = document(summaries(OUTCOMES), {})["contenders"]
    assert psgd["updates_per_s"] == {"median": 850, "min": 800, "max": 900}
    assert (psgd["psgd_ratio"], hogwild["psgd_ratio"]) == (1.0, 850 / 400)
    assert (psgd["failures"], hogwild["failures"]) == (0, 1)


def test_a_contender_without_a_run_has_no_figures() -> None:
    results = summaries([Failure("psgd_job", "it broke"), run("hogwild", 400)])
    psgd, hogwild = json.loads(json.dumps(document(results, {})))["contenders"]
    assert (psgd["updates_per_s"], psgd["psgd_ratio"], hogwild["psgd_ratio"]) == (None, None, None)


def test_the_table_shows_each_contender_in_a_row() -> None:
    console = Console(file=StringIO(), width=200, record=True)
    console.print(table(summaries([*OUTCOMES, Failure("ddp_gloo", "it broke")])))
    rows = console.export_text().splitlines()
    assert any("PyTorch Hogwild" in row and "400" in row and "2.12 ×" in row for row in rows)
    assert any("PyTorch DDP" in row and "failed" in row for row in rows)
