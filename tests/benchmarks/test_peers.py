"""Tests of the peers' computations: data, gradients, steps, and the checks of psgd's own run."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from psgd.job import OpenJob
from psgd.spec import JobSpec
from psgd_workers.messages import BatchId
from tests.benchmarks.measurement import Measurement, Span
from tests.benchmarks.mnist import Batches, Mnist
from tests.benchmarks.network import backpropagate, network
from tests.benchmarks.peers.ddp_gloo import World, in_lock_step
from tests.benchmarks.peers.numpy_loops import NumpyMlp
from tests.benchmarks.peers.own_loops import OwnLoop
from tests.benchmarks.peers.psgd_job import check_lanes, job, measurement, run_job_command_line
from tests.benchmarks.process_group import run_process_group


@pytest.fixture
def data() -> Mnist:
    random = np.random.default_rng(0)
    features = random.random((300, 784), np.float32)
    labels = random.integers(0, 10, 300)
    return Mnist(features, labels, features, labels)


def test_an_epoch_has_every_example_once_in_an_order_of_its_own(data: Mnist) -> None:
    batches = Batches(data, seed=0)
    first, second = (np.concatenate([batches[index][0] for index in epoch]) for epoch in (range(3), range(3, 6)))
    assert [len(batches[index][1]) for index in range(3)] == [128, 128, 44]
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(np.sort(first, axis=0), np.sort(data.train_features, axis=0))
    np.testing.assert_array_equal(np.sort(second, axis=0), np.sort(data.train_features, axis=0))


def test_the_hand_written_gradients_are_those_of_torch(data: Mnist) -> None:
    mlp = NumpyMlp(seed=0)
    model = network()
    parameters = list(model.parameters())
    with torch.no_grad():
        for parameter, values in zip(parameters[::2], mlp.weights, strict=True):
            parameter.copy_(torch.from_numpy(values.T))
        for parameter, values in zip(parameters[1::2], mlp.biases, strict=True):
            parameter.copy_(torch.from_numpy(values))
    features, labels = Batches(data, seed=0)[0]
    backpropagate(model, features, labels)
    expected = [parameter.grad.numpy() for parameter in parameters if parameter.grad is not None]
    for layer, (by_weight, by_bias) in enumerate(reversed(mlp.gradients(features, labels))):
        np.testing.assert_allclose(by_weight.T, expected[2 * layer], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(by_bias, expected[2 * layer + 1], rtol=1e-4, atol=1e-6)


def test_the_network_has_the_measured_size() -> None:
    sizes = [parameter.numel() for parameter in network().parameters()]
    assert sum(sizes) == 235_146


def test_psgd_is_given_a_valid_job() -> None:
    assert JobSpec.model_validate(job(2.0)).run.max_time_s == 2.0


RESULT: dict[str, Any] = {
    "status": "finished",
    "updates": 401,
    "metrics": {"perf/updates_per_s": 100.0, "val/accuracy": 0.9, "async/staleness_mean": 1.0},
    "error": None,
}


def test_a_result_of_psgd_becomes_a_measurement() -> None:
    found = measurement(RESULT)
    assert (found.updates_per_s, found.updates, found.seconds, found.val_accuracy) == (100.0, 401, 4.0, 0.9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"status": "failed", "error": "the server died"}, "failed: the server died"),
        ({"metrics": RESULT["metrics"] | {"val/accuracy": None}}, "no epoch was complete after 401 updates"),
    ],
)
def test_a_run_of_psgd_that_measured_nothing_ends_the_contender(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        measurement(RESULT | change)


def test_the_settings_of_a_command_line_are_given_to_the_measurement(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(seconds: float, settings: Sequence[str]) -> Measurement:
        return Measurement(" ".join(settings), 10.0, 11, seconds, 0.9)

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["peer", "--seconds", "2", "--set", "data.batch_size=32", "--set", "seed=3"])
    run_job_command_line(measure, "A peer.")
    found = json.loads(capsys.readouterr().out)
    assert (found["name"], found["seconds"]) == ("data.batch_size=32 seed=3", 2)


DIGITS = {"format": "sklearn", "dataset": "digits", "batch_size": 500, "validation_fraction": 0.2}


def test_an_own_loop_is_serial_sgd_through_all_epochs() -> None:
    spec = JobSpec.model_validate(job(1.0) | {"data": DIGITS})
    loop = OwnLoop(spec)
    opened = OpenJob.open(spec)
    weights = opened.weights
    gradient = np.empty_like(opened.weights)
    worker = opened.worker("other")
    for number, batch in enumerate([(0, 0), (0, 1), (0, 2), (1, 0)]):
        loop.step(number)
        worker.gradient(BatchId(batch[0], 0, batch[1]), weights, gradient)
        weights -= np.float32(spec.optimizer.lr) * gradient
    np.testing.assert_array_equal(loop.weights, weights)
    assert 0 < loop.accuracy() < 1


def steps(rank: int, world: World) -> tuple[Span, list[int]]:
    batches: list[int] = []

    def backward(model: torch.nn.Module, batch: int) -> None:
        batches.append(batch)
        model(torch.ones(1, 2)).sum().backward()

    return in_lock_step(rank, world, 0.2, torch.nn.Linear(2, 1), backward), batches


def test_processes_in_lock_step_take_as_many_batches_and_none_twice(tmp_path: Path) -> None:
    (first, mine), (second, others) = run_process_group(2, steps, World.of(2, str(tmp_path)))
    assert first.updates == second.updates == len(mine) == len(others)
    assert sorted(mine + others) == list(range(2 * first.updates))


@pytest.mark.parametrize(
    ("asked", "servers", "came", "message"),
    [
        ("auto", 1, ["shm"], None),
        ("tcp", 2, ["tcp", "tcp"], None),
        ("auto", 1, ["ray"], r"expected \['shm'\]"),
        ("auto", 2, ["shm"], r"expected \['shm', 'shm'\]"),
    ],
)
def test_a_run_by_another_lane_than_meant_is_no_measurement(
    tmp_path: Path, asked: str, servers: int, came: list[str], message: str | None
) -> None:
    (tmp_path / "resolved.json").write_text(json.dumps({"scaling": {"lane": asked, "servers": servers}}))
    lines = [{"event": "started"}, {"event": "worker_up", "lanes": came}]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if message is None:
        check_lanes(tmp_path)
        return
    with pytest.raises(SystemExit, match=message):
        check_lanes(tmp_path)
