from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.partitions import Partition
from psgd.core.server.report import EpochLoss, Mark, Report, staleness_summary
from psgd_workers.messages import Version
from tests.support.jobs import GRID, START, job


@pytest.fixture
def report() -> Report:
    return ParameterServer(job(), Partition(0, 0, 6, 6), START, GRID, Version(1, 0)).report()


@given(st.lists(st.integers(0, 50), min_size=1, max_size=300))
def test_staleness_is_summed_up_as_numpy_does(values: list[int]) -> None:
    summary = staleness_summary(Counter(values))
    assert summary["mean"] == pytest.approx(np.mean(values))
    assert summary["p50"] == np.percentile(values, 50, method="inverted_cdf")
    assert summary["p95"] == np.percentile(values, 95, method="inverted_cdf")
    assert summary["max"] == max(values)


def test_no_staleness_is_no_number() -> None:
    assert staleness_summary({}) == {"mean": None, "p50": None, "p95": None, "max": None}


def test_rates_leave_the_first_step_out(report: Report) -> None:
    report = replace(report, first=Mark(10.0, 100, 3200), last=Mark(14.0, 108, 3456))
    assert report.rate("updates") == 2
    assert report.rate("samples") == 64


@pytest.mark.parametrize("last", [None, Mark(10.0, 100, 3200)])
def test_one_step_has_no_rate(report: Report, last: Mark | None) -> None:
    assert replace(report, first=last, last=last).rate("updates") is None


def test_an_epochs_loss_is_a_mean_over_examples() -> None:
    assert EpochLoss(6.0, 4).mean == 1.5
