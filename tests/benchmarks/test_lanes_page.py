"""Tests of the page of results and of its figure."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.batch_sizes import Rates
from tests.benchmarks.batch_sizes import findings as efficiencies
from tests.benchmarks.findings import Finding, document
from tests.benchmarks.lanes_page import figure, main, page
from tests.benchmarks.measurement import Measurement
from tests.benchmarks.report import document as throughput_document
from tests.benchmarks.report import summaries

SPEEDS = {"psgd_job": 900.0, "own_loops": 1000.0, "hogwild": 600.0}


def throughput() -> dict[str, Any]:
    runs = [Measurement(name, rate, 100, 1.0, 0.9) for name, rate in SPEEDS.items()]
    return throughput_document(summaries(runs), {"model": [784, 10], "repeats": 1})


def by_batch_size() -> dict[str, Any]:
    found = [Rates(32, [500.0], [1000.0], [], 0), Rates(2048, [99.0], [100.0], [], 0)]
    return document(efficiencies(found), {"repeats": 1}, [asdict(one) for one in found])


def other() -> dict[str, Any]:
    return document([Finding("a push", 1.2, "×", at_most=1.5, turns=(1.1, 1.3))], {"repeats": 2}, {})


def test_every_finding_is_a_row() -> None:
    text = page({"throughput": throughput(), "transfer": other()})
    assert "| gradients/s of psgd ÷ PyTorch Hogwild | ≥ 1.1 | 1.5 × |  | yes |" in text
    assert "| a push | ≤ 1.5 | 1.2 × | 1.1 to 1.3 | yes |" in text
    assert "| PyTorch Hogwild | 600 | 600 to 600 | 0.900 |" in text
    assert re.search(r"`throughput` on .+, \d+ of \d+ cores: model 784 10, repeats 1\.", text)


def test_bars_are_sorted_and_say_what_they_are_of_the_limit() -> None:
    (axes,) = figure(throughput()).axes
    assert [text.get_text() for text in axes.texts] == ["1,000", "900, 0.90 of the limit", "600, 0.60 of the limit"]


def test_page_and_figure_are_made_of_the_documents_that_have_findings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = tmp_path / "bench"
    out = tmp_path / "out"
    bench.mkdir()
    out.mkdir()
    trees = {"transfer": other(), "throughput": throughput(), "order": {"orders_agree": True}, "extra": other()}
    trees["batch_sizes"] = by_batch_size()
    for name, tree in trees.items():
        (bench / f"{name}.json").write_text(json.dumps(tree))
    monkeypatch.setattr("sys.argv", ["lanes_page", "--bench", str(bench), "--out", str(out)])
    assert main() == 0
    headings = [line for line in (out / "LANES.md").read_text().splitlines() if line.startswith("## ")]
    assert headings == [
        "## Gradients per second, two workers",
        "## Larger batches",
        "## Large weights",
        "## extra",
    ]
    for name in ("throughput", "batch_sizes"):
        assert (out / f"{name}.svg").read_text().startswith("<svg")
        assert f"]({name}.svg)" in (out / "LANES.md").read_text()


def test_nothing_measured_is_no_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["lanes_page", "--bench", str(tmp_path), "--out", str(tmp_path)])
    assert main() == 1
