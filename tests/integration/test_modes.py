"""The consistency modes on a real local Ray, and changes of settings while a run trains."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

import psgd
from psgd.store.run_directory import RunDirectory
from psgd.store.storage import Storage
from tests.support.command_line import LIMIT_S, eventually, recorded
from tests.support.digits_run import DATA

pytestmark = pytest.mark.usefixtures("local_ray")

EXAMPLES = 1438  # in an epoch
BATCHES = 45  # ceil(1438 / 32)
EPOCHS = 2


def job(tmp_path: Path, **sections: Any) -> psgd.JobSpec:
    """Return a small job on digits with three workers; `sections` replace those of the spec."""
    tree: dict[str, Any] = {
        "name": "run",
        "model": {"kind": "mlp", "hidden": [16]},
        "data": DATA,
        "optimizer": {"lr": 0.1},
        "scaling": {"workers": 3},
        "run": {"epochs": EPOCHS, "storage": str(tmp_path)},
    }
    return psgd.JobSpec.model_validate(tree | sections)


def test_modes_that_wait_refuse_and_collect_apply_every_example_once(tmp_path: Path) -> None:
    modes: list[dict[str, Any]] = [
        {"mode": "k_sync", "k": 2},
        {"mode": "ssp", "s": 1},
        {"mode": "ringmaster", "r": 2, "stop": True},
        {"mode": "ringleader"},
        {"mode": "buffered", "k": 4},
    ]
    for mode in modes:
        result = psgd.train(job(tmp_path, consistency=mode), name=mode["mode"], progress=False)
        assert (result.status, result.samples) == ("finished", EPOCHS * EXAMPLES), mode
        assert result.ledger.batches == result.ledger.applied == EPOCHS * BATCHES, mode
        assert result.ledger.discarded == 0, mode


def test_late_gradients_are_dropped_where_the_job_says_so(tmp_path: Path) -> None:
    model = {"kind": "python", "path": "tests.support.faulty_models:slow", "kwargs": {"seconds": 0.03}}
    spec = job(
        tmp_path,
        model=model,  # slow enough that all workers train at the same time, although they start one after the other
        consistency={"mode": "ringmaster", "r": 1, "late": "discard"},
        run={"epochs": 4, "storage": str(tmp_path)},
    )
    ledger = psgd.train(spec, progress=False).ledger
    assert ledger.discarded > 0
    assert ledger.applied + ledger.discarded == ledger.batches == 4 * BATCHES


def test_local_steps_push_several_batches_together(tmp_path: Path) -> None:
    mode = {"mode": "local", "h": 4, "lr": 0.1}
    result = psgd.train(job(tmp_path, consistency=mode, optimizer={"lr": 1.0}), progress=False)
    assert result.updates == EPOCHS * 12  # ceil(45 / 4)
    assert result.samples == EPOCHS * EXAMPLES
    assert (result.metrics["val/accuracy"] or 0) > 0.5


@pytest.mark.parametrize(
    ("sections", "bytes_per_push"),
    [
        ({"correction": {"name": "dc_asgd", "variant": "adaptive"}}, 2 * 4 * 1210),
        ({"correction": {"name": "dana", "momentum": 0.5}}, 4 * 1210),
        ({"compression": {"name": "top_k", "ratio": 0.1}}, 8 * 121),
        ({"compression": {"name": "fp16"}}, 2 * 1210),
        ({"optimizer": {"name": "adam", "lr": 1e-3, "schedule": {"name": "cosine", "epochs": 2}}}, 4 * 1210),
    ],
    ids=["dc_asgd", "dana", "top_k", "fp16", "adam"],
)
def test_what_a_push_carries_is_in_the_metrics(tmp_path: Path, sections: dict[str, Any], bytes_per_push: int) -> None:
    result = psgd.train(job(tmp_path, **sections), progress=False)
    assert result.ledger.applied == EPOCHS * BATCHES
    assert result.metrics["perf/bytes_per_push"] == bytes_per_push
    assert ((result.metrics["compression/residual_norm"] or 0) > 0) == ("compression" in sections)


def test_settings_change_while_a_run_trains_and_a_resumed_one_keeps_them(tmp_path: Path) -> None:
    spec = job(tmp_path, run={"epochs": 100_000, "storage": str(tmp_path)})
    run = tmp_path / "run"
    results: list[psgd.Result] = []
    driver = Thread(target=lambda: results.append(psgd.train(spec, progress=False)))
    driver.start()
    try:
        eventually(lambda: recorded(run, "evaluated"))
        directory = RunDirectory(Storage(str(run)))
        directory.command("set", ["consistency.mode=bsp", "optimizer.lr=0.05"])
        eventually(lambda: recorded(run, "changed"))
        directory.command("set", ["data.batch_size=64"])
        directory.command("set", ["consistency={mode: k_sync, k: 9}"])
        seen = len(recorded(run, "evaluated"))
        eventually(lambda: len(recorded(run, "evaluated")) > seen + 1)
    finally:
        RunDirectory(Storage(str(run))).command("stop")
        driver.join(LIMIT_S)
    (changed,) = recorded(run, "changed")
    assert changed["settings"]["consistency"] == {"mode": "bsp"}
    assert changed["version"][1] > BATCHES
    assert [event["accepted"] for event in recorded(run, "command")] == [True, False, False, True]
    reasons = [event["reason"] for event in recorded(run, "command") if not event["accepted"]]
    assert "data.batch_size cannot change while the job runs" in reasons[0]
    assert "consistency.k is 9, but the job has 3 workers" in reasons[1]

    (result,) = results
    assert result.ledger.batches == result.ledger.applied
    after = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert after[-1]["updates"] < result.ledger.batches  # after the change, three batches make one update
    more = {"epochs": result.epochs + 2, "storage": str(tmp_path)}
    resumed = psgd.train(job(tmp_path, run=more), resume=True, progress=False)
    gained = resumed.updates - result.updates
    assert 0 < gained <= 3 * (BATCHES // 3 + 1)  # still one update for three batches
    assert resumed.ledger.batches == resumed.ledger.applied == (result.epochs + 2) * BATCHES
