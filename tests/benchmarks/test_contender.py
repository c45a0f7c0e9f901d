"""A contender that fails is reported with its error, and one that exceeds its time limit is ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.contender import Failure, run_contender


def test_a_contender_that_fails_is_reported_with_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSGD_TEST_DATA", str(tmp_path))
    outcome = run_contender("numpy_loops", seconds=0.1, limit_s=60)
    assert isinstance(outcome, Failure)
    assert outcome.error.startswith("FileNotFoundError")


@pytest.mark.usefixtures("mnist_file")
def test_a_contender_is_ended_at_its_limit() -> None:
    assert run_contender("numpy_loops", seconds=100, limit_s=1) == Failure("numpy_loops", "not done after 1 s")
