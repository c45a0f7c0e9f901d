"""The peers compute what they are said to compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from psgd.spec import JobSpec
from tests.benchmarks.mnist import Batches, Mnist
from tests.benchmarks.network import backpropagate, network
from tests.benchmarks.peers.numpy_loops import NumpyMlp
from tests.benchmarks.peers.psgd_job import job, measurement


@pytest.fixture
def data() -> Mnist:
    random = np.random.default_rng(0)
    features, labels = random.random((300, 784), np.float32), random.integers(0, 10, 300)
    return Mnist(features, labels, features, labels)


def test_an_epoch_has_every_example_once_in_an_order_of_its_own(data: Mnist) -> None:
    batches = Batches(data, seed=0)
    first, second = (np.concatenate([batches[index][0] for index in epoch]) for epoch in (range(3), range(3, 6)))
    assert [len(batches[index][1]) for index in range(3)] == [128, 128, 44]
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(np.sort(first, axis=0), np.sort(data.train_features, axis=0))
    np.testing.assert_array_equal(np.sort(second, axis=0), np.sort(data.train_features, axis=0))


def test_the_hand_written_gradients_are_those_of_torch(data: Mnist) -> None:
    mlp, model = NumpyMlp(seed=0), network()
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
