"""Tests of the efficiency by batch size, on made-up runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests.benchmarks import batch_sizes
from tests.benchmarks.batch_sizes import Rates, figure, findings, joined, rates, table
from tests.benchmarks.contender import Failure
from tests.benchmarks.measurement import Measurement

SMALL = Rates(32, [1000, 1200, 1100], [2000, 2000, 2500], [120, 410, 400, 130, 400, 390], 0)
LARGE = Rates(2048, [70, 72], [72, 74], [], 0)
FAILED = Rates(512, [], [290], [], 1)


def run(name: str, rate: float, **details: float) -> Measurement:
    return Measurement(name, rate, 100, 1.0, 0.9, details)


def tree(*found: Rates) -> dict[str, Any]:
    runs: dict[str, Any] = json.loads(json.dumps({"runs": [asdict(one) for one in found]}))
    return runs


def test_runs_of_a_size_become_rates_of_psgd_and_of_the_loops() -> None:
    outcomes: list[Measurement | Failure] = [
        run("psgd_unvalidated_job", 700, round_trip_ns=120),
        run("own_loops", 1000, round_trip_ns=400),
        Failure("psgd_unvalidated_job", "it broke"),
        run("own_loops", 900),
    ]
    assert rates(128, outcomes) == Rates(128, [700], [1000, 900], [120, 400], 1)


def test_the_efficiency_is_a_ratio_of_medians_with_the_ratio_of_each_turn() -> None:
    small, failed, large = findings([SMALL, FAILED, LARGE])
    assert (small.value, small.turns) == (1100 / 2000, (0.5, 0.6, 0.44))
    assert failed.value is None
    assert large.value == 71 / 73


def test_sizes_measured_later_replace_and_join_the_earlier() -> None:
    again = Rates(32, [1], [2], [], 0)
    assert joined([LARGE, SMALL], [FAILED, again]) == [again, FAILED, LARGE]


def test_sizes_can_be_measured_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "batch_sizes.json"

    def turn(label: str, name: str, *_: object) -> Measurement | Failure:
        return Failure(name, "it broke") if "512" in label else run(name, 100)

    monkeypatch.setattr(batch_sizes, "begin", lambda: None)
    monkeypatch.setattr(batch_sizes, "run_turn", turn)
    exits = []
    for size in ("512", "32"):
        monkeypatch.setattr("sys.argv", ["batch_sizes", "--repeats", "2", "--sizes", size, "--join", "--out", str(out)])
        exits.append(batch_sizes.main())
    assert exits == [1, 1]  # the failures of the first call are still in the document
    document = json.loads(out.read_text())
    assert document["settings"]["sizes"] == [32, 512]
    assert [one["value"] for one in document["findings"]] == [1, None]
    assert out.with_suffix(".svg").read_text().startswith("<svg")


def test_the_table_has_a_row_for_each_size() -> None:
    console = Console(file=StringIO(), width=200, record=True)
    console.print(table([SMALL, FAILED, LARGE]))
    rows = [[cell.strip() for cell in row.split("│")[1:-1]] for row in console.export_text().splitlines()]
    assert ["32", "1,100", "2,000", "0.55", "0.44 to 0.6", "395", "0"] in rows
    assert ["512", "", "290", "failed", "", "", "1"] in rows
    assert ["2,048", "71", "73", "0.97", "0.972 to 0.973", "", "0"] in rows


def test_the_figure_has_a_point_with_its_rate_for_each_size_that_was_measured() -> None:
    (axes,) = figure(tree(SMALL, FAILED, LARGE)).axes
    assert [text.get_text() for text in axes.texts] == ["0.55\n1,100/s", "0.97\n71/s"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["32", "2,048"]
    psgd, loops = (np.asarray(line.get_ydata()).tolist() for line in axes.lines)
    assert loops == [1, 1]
    assert psgd == [1100 / 2000, 71 / 73]
