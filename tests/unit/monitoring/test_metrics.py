from __future__ import annotations

from psgd.monitoring.metrics import metrics_row, run_metrics
from psgd_workers.messages import Evaluation
from tests.support.statuses import status


def test_each_value_tells_its_epoch() -> None:
    one = status(epochs=3, loss=0.2, loss_epoch=4, validation=Evaluation(0.4, 0.9, 10), validation_epoch=2)
    row = metrics_row(one)
    assert (row["epochs"], row["train/epoch"], row["val/epoch"]) == (3, 4, 2)
    assert (row["train/loss"], row["val/loss"], row["val/accuracy"]) == (0.2, 0.4, 0.9)


def test_what_was_not_measured_is_none() -> None:
    unknown = {name for name, value in run_metrics(status()).items() if value is None}
    assert unknown == {
        *("train/loss", "train/epoch", "val/loss", "val/accuracy", "val/epoch"),
        *("perf/updates_per_s", "perf/samples_per_s", "perf/bytes_per_push", "perf/compiled"),
        *(f"async/staleness_{name}" for name in ("mean", "p50", "p95", "max")),
    }


def test_a_row_is_the_metrics_and_how_far_the_run_is() -> None:
    one = status(epochs=3, updates=40, staleness={0: 1, 2: 3})
    assert metrics_row(one) == {"epochs": 3, "updates": 40, "workers": 1} | run_metrics(one)
    assert run_metrics(one)["async/staleness_mean"] == 1.5
