from __future__ import annotations

from typing import Any

import pytest

from psgd.core.driver.status import RunStatus
from psgd.monitoring.pace import LEAST_S, WINDOW_S, Pace
from psgd.spec import RunConfig
from tests.support.statuses import status


def pace(**limits: Any) -> Pace:
    return Pace(RunConfig.model_validate({"epochs": None} | limits))


def left_s(pace: Pace, *seen: RunStatus) -> float | None:
    for one in seen:
        pace.see(one)
    return pace.left_s()


def at(now: float, batches: int, epochs: int = 0, **fields: Any) -> RunStatus:
    return status(now=now, batches=batches, epochs=epochs, **fields)


def test_the_rest_of_the_epochs_takes_as_long_as_the_batches_so_far() -> None:
    assert left_s(pace(epochs=2), at(10.0, 0), at(15.0, 5)) == pytest.approx(15.0)


def test_a_resumed_run_is_not_as_fast_as_what_it_found_done() -> None:
    assert left_s(pace(epochs=4), at(0.0, 0, epochs=3), at(10.0, 5, epochs=3)) == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("limits", "share"),
    [
        ({"epochs": 2}, 0.25),
        ({"epochs": 2, "max_updates": 10}, 0.5),
        ({"epochs": 2, "max_time_s": 5.0}, 0.8),
        ({"max_updates": 2}, 1.0),
    ],
)
def test_the_nearest_limit_counts(limits: dict[str, Any], share: float) -> None:
    assert pace(**limits).share(at(4.0, 5, updates=5)) == pytest.approx(share)


def test_nothing_is_told_at_once_nor_while_nothing_happens_nor_at_the_end() -> None:
    assert left_s(pace(epochs=2)) is None
    assert left_s(pace(epochs=2), at(0.0, 0), at(LEAST_S / 2, 5)) is None
    assert left_s(pace(epochs=2), at(0.0, 3), at(LEAST_S, 3)) is None
    assert left_s(pace(epochs=1), at(0.0, 0), at(LEAST_S, 0, epochs=1)) is None
    assert left_s(pace(epochs=2), at(0.0, 0), at(LEAST_S, 5, phase="ending")) is None


def test_only_the_last_half_minute_counts() -> None:
    slow = at(0.0, 0)
    fast = [at(100.0 + second, second) for second in range(11)]
    assert left_s(pace(epochs=10), slow, *fast) == pytest.approx(90.0)
    assert WINDOW_S < 100


def test_a_restored_server_starts_the_estimate_anew() -> None:
    before = [at(0.0, 0), at(5.0, 9)]
    after = [at(6.0, 1), at(9.0, 4)]
    assert left_s(pace(epochs=1), *before, *after) == pytest.approx(6.0)
