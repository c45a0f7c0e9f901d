from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from psgd_workers.data.examples import Examples
from psgd_workers.messages import FloatArray
from psgd_workers.models.evaluation import evaluate
from psgd_workers.models.numpy.network import Network
from psgd_workers.spec import LossName

rng = np.random.default_rng(0)
FEATURES = rng.normal(size=(23, 4)).astype(np.float32)


@pytest.mark.parametrize("rows", [1, 5, 23, 1024])
@pytest.mark.parametrize("num_classes", [2, 3])
def test_classes_are_the_largest_logit(num_classes: int, rows: int) -> None:
    network = Network((4, num_classes), "cross_entropy")
    weights = network.initial_weights(0)
    labels = rng.integers(0, num_classes, 23)
    logits = FEATURES.astype(np.float64) @ weights["layers.0.weight"].T
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(23), labels]
    evaluation = evaluate(network, weights, Examples(FEATURES, labels), rows)
    assert evaluation.loss == pytest.approx(losses.mean(), rel=1e-6)
    assert evaluation.accuracy == np.mean(logits.argmax(axis=1) == labels)
    assert evaluation.examples == 23


@pytest.mark.parametrize("rows", [5, 1024])
def test_one_logit_means_class_one_when_positive(rows: int) -> None:
    network = Network((4, 1), "binary_cross_entropy")
    weights = network.initial_weights(0)
    labels = rng.integers(0, 2, 23)
    logits = FEATURES.astype(np.float64) @ weights["layers.0.weight"][0]
    evaluation = evaluate(network, weights, Examples(FEATURES, labels), rows)
    assert evaluation.loss == pytest.approx(np.log1p(np.exp(np.where(labels, -logits, logits))).mean(), rel=1e-6)
    assert evaluation.accuracy == np.mean((logits > 0) == labels)


@pytest.mark.parametrize("rows", [5, 1024])
def test_a_regression_has_no_accuracy(rows: int) -> None:
    network = Network((4, 2), "mse")
    weights = network.initial_weights(0)
    labels = rng.normal(size=(23, 2)).astype(np.float32)
    errors = FEATURES.astype(np.float64) @ weights["layers.0.weight"].T - labels
    evaluation = evaluate(network, weights, Examples(FEATURES, labels), rows)
    assert evaluation.loss == pytest.approx(np.square(errors).mean(), rel=1e-6)
    assert evaluation.accuracy is None


def test_no_more_rows_are_predicted_at_once_than_asked() -> None:
    class Counting(Network):
        def predict(self, weights: Mapping[str, FloatArray], features: FloatArray) -> FloatArray:
            seen.append(len(features))
            return super().predict(weights, features)

    seen: list[int] = []
    loss: LossName = "mse"
    network = Counting((4, 1), loss)
    evaluate(network, network.initial_weights(0), Examples(FEATURES, np.zeros((23, 1), np.float32)), rows_at_once=10)
    assert seen == [10, 10, 3]


def test_a_model_that_changes_its_inputs_in_place_is_given_copies_of_read_only_data() -> None:
    class InPlace(Network):
        def predict(self, weights: Mapping[str, FloatArray], features: FloatArray) -> FloatArray:
            features *= 2
            return super().predict(weights, features)

        def loss(self, outputs: FloatArray, labels: NDArray[Any]) -> float:
            value = super().loss(outputs, labels)
            outputs *= -1
            labels *= 0
            return value

    plain = Network((4, 3), "cross_entropy")
    network = InPlace((4, 3), "cross_entropy")
    weights = plain.initial_weights(0)
    labels = rng.integers(0, 3, 23)
    features = FEATURES.copy()
    for array in (features, labels):
        array.flags.writeable = False  # like arrays in Ray's object store
    expected = evaluate(plain, weights, Examples(2 * FEATURES, labels))
    assert evaluate(network, weights, Examples(features, labels)) == expected
