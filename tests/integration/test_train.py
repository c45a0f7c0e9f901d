"""Whole runs on a real local Ray, through `psgd.train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray._private.state import actors

import psgd
from psgd.errors import CheckpointError, InputError, ModelError, ResumeError, RunExistsError, RunFailedError
from psgd_workers.data import Dataset, open_dataset
from psgd_workers.data.shards import Shards
from psgd_workers.gradients.layout import Layout
from psgd_workers.messages import BatchId, FloatArray
from psgd_workers.models import Model, build_model
from tests.support.command_line import LIMIT_S, eventually, recorded
from tests.support.digits_run import DATA, ENDLESS, stop_after_epochs, training

pytestmark = pytest.mark.usefixtures("local_ray")

BATCHES = 45  # ceil(1438 / 32)


def job(tmp_path: Path, **changes: Any) -> psgd.JobSpec:
    """Return a small job on digits; `changes` replace sections, and `run` is merged."""
    tree: dict[str, Any] = {
        "name": "run",
        "model": {"kind": "mlp", "hidden": [32]},
        "data": DATA,
        "optimizer": {"lr": 0.2, "momentum": 0.5},
        "scaling": {"workers": 1},
        "run": {"epochs": 2, "storage": str(tmp_path)},
    }
    for name, value in changes.items():
        tree[name] = tree.get(name, {}) | value if isinstance(value, dict) and name == "run" else value
    return psgd.JobSpec.model_validate(tree)


def events(result: psgd.Result, kind: str) -> list[dict[str, Any]]:
    """Return the events of one kind in a run's record."""
    lines = [json.loads(line) for line in (Path(result.path) / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


class Reference:
    """A serial computation of a job, without servers or leases."""

    def __init__(self, spec: psgd.JobSpec) -> None:
        data = spec.data
        self.dataset: Dataset = open_dataset(data, spec.seed, spec.model.loss)
        self.shards = Shards(len(self.dataset.train), data.num_shards, data.batch_size, spec.seed, data.shuffle)
        self.model: Model = build_model(spec.model, self.dataset)
        tensors = self.model.initial_weights(spec.seed)
        self.layout = Layout.of(tensors)
        self.weights = self.layout.pack(tensors)
        self.velocity: FloatArray | None = None

    def gradient(self, epoch: int, index: int) -> FloatArray:
        rows = self.shards.rows(BatchId(epoch, 0, index))
        train = self.dataset.train
        out = np.empty_like(self.weights)
        views = self.layout.views(self.weights), self.layout.views(out)
        self.model.loss_and_gradient(views[0], train.inputs(rows), train.labels[rows], views[1], 0)
        return out

    def step(self, gradient: FloatArray, lr: float = 0.2, momentum: float = 0.5) -> None:
        self.velocity = gradient if self.velocity is None else momentum * self.velocity + gradient
        self.weights -= np.float32(lr) * self.velocity

    def named(self) -> dict[str, FloatArray]:
        return self.layout.views(self.weights)


def assert_same_bits(found: dict[str, FloatArray], expected: dict[str, FloatArray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_two_asynchronous_workers_learn_digits_with_every_batch_once(tmp_path: Path) -> None:
    result = psgd.train(job(tmp_path, scaling={"workers": 2}, run={"epochs": 12}), progress=False)
    assert result.status == "finished"
    assert (result.metrics["val/accuracy"] or 0) >= 0.95
    assert (result.epochs, result.updates, result.samples) == (12, 12 * BATCHES, 12 * 1438)
    assert result.ledger.batches == result.ledger.applied == 12 * BATCHES
    shared = sum(event["batches"] for event in events(result, "taken_over"))  # leased to an idle worker as well
    assert result.ledger.duplicates <= shared
    assert result.ledger.requeued <= shared
    assert result.failures == {}
    assert (result.metrics["perf/updates_per_s"] or 0) > 0
    present = {path.name for path in Path(result.path).iterdir()}
    assert present >= {
        "spec.yaml",
        "resolved.json",
        "env.json",
        "owner",
        "metrics.jsonl",
        "events.jsonl",
        "result.json",
    }
    assert json.loads((Path(result.path) / "result.json").read_text())["status"] == "finished"


def test_one_asynchronous_worker_is_a_serial_loop_bit_for_bit(tmp_path: Path) -> None:
    spec = job(tmp_path)
    result = psgd.train(spec, progress=False)
    reference = Reference(spec)
    for epoch in range(2):
        for index in range(BATCHES):
            reference.step(reference.gradient(epoch, index))
    assert_same_bits(psgd.load_weights(result.path), reference.named())
    assert result.metrics["async/staleness_max"] == 0


def test_bsp_steps_on_the_mean_of_every_worker_bit_for_bit(tmp_path: Path) -> None:
    spec = job(tmp_path, scaling={"workers": 2}, consistency={"mode": "bsp"})
    result = psgd.train(spec, progress=False)
    reference = Reference(spec)
    for epoch in range(2):
        for index in range(0, BATCHES - 1, 2):
            total = reference.gradient(epoch, index) + reference.gradient(epoch, index + 1)
            reference.step(total / np.float32(2))
        reference.step(reference.gradient(epoch, BATCHES - 1))  # the last round has one batch left
    assert_same_bits(psgd.load_weights(result.path), reference.named())
    assert result.updates == 2 * 23
    assert result.metrics["async/staleness_max"] == 0


@pytest.mark.parametrize("mode", ["async", "bsp"])
def test_a_worker_killed_mid_epoch_is_replaced_and_every_batch_counts_once(tmp_path: Path, mode: str) -> None:
    model = {"kind": "python", "path": "tests.support.faulty_models:dies_once"}
    model["kwargs"] = {"at": 10, "marker": str(tmp_path / "dead")}  # type: ignore[assignment]
    both = {"scaling": {"workers": 2}, "consistency": {"mode": mode}}
    run = tmp_path / "run"
    with training(job(tmp_path, model=model, run={"epochs": ENDLESS}, **both)) as under_way:
        eventually(lambda: len(recorded(run, "worker_up")) == 3)
        stop_after_epochs(run)
        stopped = under_way.result(LIMIT_S)
    assert (tmp_path / "dead").exists()
    assert (len(events(stopped, "worker_lost")), len(events(stopped, "worker_started"))) == (1, 3)
    assert stopped.ledger.requeued > 0 or events(
        stopped, "taken_over"
    )  # or taken over by the other worker, before the driver learned of the death
    epochs = stopped.epochs + 1
    result = psgd.train(job(tmp_path, model=model, run={"epochs": epochs}, **both), resume=True, progress=False)
    assert result.ledger.batches == result.ledger.applied == epochs * BATCHES
    assert result.samples == epochs * 1438


def test_a_run_stopped_and_resumed_mid_epoch_ends_as_if_undisturbed(tmp_path: Path) -> None:
    spec = job(tmp_path)
    whole = psgd.train(spec, name="whole", progress=False)
    half = job(tmp_path, run={"epochs": None, "max_updates": 60})
    first = psgd.train(half, name="halves", progress=False)
    assert (first.updates, first.epochs) == (60, 1)
    with pytest.raises(RunExistsError, match="--resume"):
        psgd.train(spec, name="halves", progress=False)
    second = psgd.train(spec, name="halves", resume=True, progress=False)
    assert second.ledger.applied == whole.ledger.applied == 2 * BATCHES
    assert second.samples == whole.samples
    assert_same_bits(psgd.load_weights(second.path), psgd.load_weights(whole.path))


def test_resuming_refuses_another_job_and_other_data(tmp_path: Path) -> None:
    psgd.train(job(tmp_path, run={"epochs": 1}), progress=False)
    with pytest.raises(ResumeError, match=r"optimizer.lr was 0.2 and is 0.1"):
        psgd.train(job(tmp_path, optimizer={"lr": 0.1, "momentum": 0.5}), resume=True, progress=False)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_used(tmp_path: Path) -> None:
    for epochs in (1, 2):
        result = psgd.train(job(tmp_path, run={"epochs": epochs}), resume=epochs > 1, progress=False)
    before, newest = sorted((Path(result.path) / "checkpoints").iterdir())
    part = newest / "server-0.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    resumed = psgd.train(job(tmp_path, run={"epochs": 3}), resume=True, progress=False)
    assert resumed.ledger.applied == 3 * BATCHES
    assert events(resumed, "started")[-1]["resumed"] == before.name
    assert "checksum" in events(resumed, "checkpoint_refused")[0]["fault"]
    for checkpoint in (Path(result.path) / "checkpoints").iterdir():
        (checkpoint / "server-0.json").write_text("{}")
    with pytest.raises(CheckpointError, match="every checkpoint"):
        psgd.load_weights(result.path)


def test_a_target_ends_the_run_early_and_time_does_too(tmp_path: Path) -> None:
    target = {"metric": "val/accuracy", "value": 0.5}
    result = psgd.train(job(tmp_path, run={"epochs": 500, "target": target}), name="target", progress=False)
    assert result.status == "finished"
    assert result.epochs < 500
    timed = psgd.train(job(tmp_path, run={"epochs": None, "max_time_s": 0.5}), name="timed", progress=False)
    assert timed.status == "finished"
    assert timed.ledger.batches == timed.ledger.applied > 0


def test_a_model_that_raises_fails_the_run_with_its_message(tmp_path: Path) -> None:
    model = {"kind": "python", "path": "tests.support.faulty_models:raises", "kwargs": {"at": 5}}
    with pytest.raises(RunFailedError, match="ArithmeticError: scripted") as failure:
        psgd.train(job(tmp_path, model=model), progress=False)
    assert failure.value.result.status == "failed"
    assert failure.value.result.updates < BATCHES


def test_a_model_that_does_not_fit_the_data_is_refused_before_anything_starts(tmp_path: Path) -> None:
    model = {"kind": "python", "path": "tests.support.faulty_models:raises", "kwargs": {"at": 1}}
    with pytest.raises(ModelError, match="first batch"):
        psgd.train(job(tmp_path, model=model), progress=False)
    assert not (tmp_path / "run").exists()


def test_a_diverged_run_fails_and_says_what_to_lower(tmp_path: Path) -> None:
    spec = job(tmp_path, optimizer={"lr": 1e30}, failure={"max_rejected": 3})
    with pytest.raises(RunFailedError, match=r"diverged.*Lower optimizer.lr"):
        psgd.train(spec, progress=False)


def test_torch_and_its_twin_mlp_reach_the_same_accuracy(tmp_path: Path) -> None:
    models: dict[str, dict[str, Any]] = {
        "torch": {"kind": "torch", "path": "tests.support.torch_modules:mlp", "kwargs": {"hidden": 32}},
        "mlp": {"kind": "mlp", "hidden": [32]},
    }
    accuracies = []
    for name, model in models.items():
        result = psgd.train(job(tmp_path, model=model, run={"epochs": 10}), name=name, progress=False)
        accuracies.append(result.metrics["val/accuracy"] or 0)
    assert min(accuracies) >= 0.95
    assert abs(accuracies[0] - accuracies[1]) <= 0.02


def test_nothing_is_left_on_the_cluster_after_success_and_failure(tmp_path: Path) -> None:
    psgd.train(job(tmp_path, run={"epochs": 1}), progress=False)
    bad = {"kind": "python", "path": "tests.support.faulty_models:raises", "kwargs": {"at": 5}}
    with pytest.raises(RunFailedError):
        psgd.train(job(tmp_path, model=bad), name="bad", progress=False)
    # Ray ends processes with a delay.
    eventually(lambda: all(actor["State"] == "DEAD" for actor in actors().values()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scaling": {"workers": 64}}, r"needs 64 CPUs .* has 4 CPUs"),
        ({"data": DATA | {"batch_size": 5000}}, "batch_size 5000 is larger than a shard"),
        ({"data": {"format": "npz", "path": "nowhere.npz"}}, r"nowhere\.npz"),
        ({"run": {"storage": "/proc/nowhere"}}, "cannot write"),
        (
            {
                "run": {"target": {"metric": "val/accuracy", "value": 1}},
                "data": {"format": "sklearn", "dataset": "iris"},
            },
            "no validation part",
        ),
    ],
)
def test_bad_input_is_refused_with_nothing_started(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        psgd.train(job(tmp_path, **changes), progress=False)
    assert not (tmp_path / "run").exists()
