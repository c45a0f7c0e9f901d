"""A contender that fails is reported with its error, and one that exceeds its time limit is ended."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.benchmarks import contender
from tests.benchmarks.contender import Failure, run_contender, run_turn
from tests.benchmarks.measurement import Measurement


def test_a_contender_that_fails_is_reported_with_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSGD_TEST_DATA", str(tmp_path))
    outcome = run_contender("numpy_loops", seconds=0.1, limit_s=60)
    assert isinstance(outcome, Failure)
    assert outcome.error.startswith("FileNotFoundError")


@pytest.mark.usefixtures("mnist_file")
def test_a_contender_is_ended_at_its_limit() -> None:
    assert run_contender("numpy_loops", seconds=100, limit_s=1) == Failure("numpy_loops", "not done after 1 s")


RUN = Measurement("hogwild", 612.4, 100, 1.0, 0.9, {"a": 1.0})


@pytest.mark.parametrize(
    ("apart_ns", "outcome", "found", "line"),
    [
        (400.0, RUN, replace(RUN, details={"a": 1.0, "round_trip_ns": 400.0}), "612/s cores 400 ns apart"),
        (None, RUN, RUN, "612/s"),
        (400.0, Failure("hogwild", "it broke"), Failure("hogwild", "it broke"), "failed: it broke cores 400 ns apart"),
    ],
)
def test_a_turn_is_printed_and_recorded_with_the_time_between_the_cores(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    apart_ns: float | None,
    outcome: Measurement | Failure,
    found: Measurement | Failure,
    line: str,
) -> None:
    monkeypatch.setattr(contender, "round_trip_ns", lambda: apart_ns)
    monkeypatch.setattr(contender, "run_contender", lambda *_: outcome)
    assert run_turn("1/3", "hogwild", 6.0, 120.0) == found
    assert capsys.readouterr().out == f"1/3 hogwild {line}\n"
