from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from psgd_workers.models.numpy.losses import LOSSES, cross_entropy
from psgd_workers.spec import LossName

NumericalGradient = Callable[[Callable[[], float], NDArray[Any]], NDArray[np.float64]]

rng = np.random.default_rng(0)
CASES: list[tuple[LossName, NDArray[np.float64], NDArray[Any]]] = [
    ("cross_entropy", rng.normal(0, 3, (7, 4)), rng.integers(0, 4, 7)),
    ("mse", rng.normal(0, 3, (7, 2)), rng.normal(0, 3, (7, 2))),
    ("binary_cross_entropy", rng.normal(0, 3, (7, 1)), rng.integers(0, 2, 7)),
]
each_loss = pytest.mark.parametrize(("name", "outputs", "labels"), CASES, ids=[case[0] for case in CASES])


def torch_loss(name: LossName, outputs: torch.Tensor, labels: NDArray[Any]) -> torch.Tensor:
    target = torch.from_numpy(labels)
    if name == "cross_entropy":
        return torch.nn.CrossEntropyLoss()(outputs, target)  # type: ignore[no-any-return]
    if name == "mse":
        return torch.nn.MSELoss()(outputs, target)  # type: ignore[no-any-return]
    return torch.nn.BCEWithLogitsLoss()(outputs[:, 0], target.double())  # type: ignore[no-any-return]


def test_every_loss_is_compared() -> None:
    assert {case[0] for case in CASES} == set(LOSSES)


@each_loss
def test_loss_and_gradient_are_torchs(name: LossName, outputs: NDArray[np.float64], labels: NDArray[Any]) -> None:
    tensor = torch.from_numpy(outputs.copy()).requires_grad_()
    expected = torch_loss(name, tensor, labels)
    expected.backward()  # type: ignore[no-untyped-call]
    gradient = np.full_like(outputs, np.nan)
    assert LOSSES[name](outputs, labels, gradient) == pytest.approx(expected.item(), rel=1e-12)
    assert tensor.grad is not None
    np.testing.assert_allclose(gradient, tensor.grad, rtol=1e-6)


@each_loss
def test_gradient_matches_central_differences(
    name: LossName, outputs: NDArray[np.float64], labels: NDArray[Any], numerical_gradient: NumericalGradient
) -> None:
    gradient = np.empty_like(outputs)
    moved = outputs.copy()
    LOSSES[name](outputs, labels, gradient)
    expected = numerical_gradient(lambda: LOSSES[name](moved, labels, np.empty_like(moved)), moved)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-8)


@each_loss
def test_the_gradient_may_replace_the_outputs(
    name: LossName, outputs: NDArray[np.float64], labels: NDArray[Any]
) -> None:
    apart = np.empty_like(outputs)
    in_place = outputs.copy()
    loss = LOSSES[name](outputs, labels, apart)
    assert LOSSES[name](in_place, labels, in_place) == loss
    np.testing.assert_array_equal(in_place, apart)


def test_cross_entropy_of_equal_logits_is_log_classes() -> None:
    logits = np.full((3, 8), 5.0)
    assert cross_entropy(logits, np.array([0, 3, 7]), logits) == pytest.approx(np.log(8))


@given(
    logits=arrays(np.float64, (4, 3), elements=st.floats(-50, 50)),
    labels=arrays(np.int64, 4, elements=st.integers(0, 2)),
    shift=st.floats(-1e3, 1e3),
)
def test_cross_entropy_ignores_a_shift_and_its_gradient_sums_to_zero(
    logits: NDArray[np.float64], labels: NDArray[np.int64], shift: float
) -> None:
    gradient = np.empty_like(logits)
    shifted = np.empty_like(logits)
    loss = cross_entropy(logits, labels, gradient)
    assert cross_entropy(logits + shift, labels, shifted) == pytest.approx(loss, rel=1e-9, abs=1e-9)
    np.testing.assert_allclose(shifted, gradient, atol=1e-9)
    np.testing.assert_allclose(gradient.sum(axis=1), 0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "outputs", "labels", "loss", "gradient"),
    [
        ("cross_entropy", [[1e4, -1e4], [1e4, -1e4]], [0, 1], 1e4, [[0, 0], [0.5, -0.5]]),
        ("binary_cross_entropy", [[1e4], [-1e4], [1e4], [-1e4]], [1, 0, 0, 1], 5e3, [[0], [0], [0.25], [-0.25]]),
    ],
)
def test_huge_logits_neither_overflow_nor_warn(
    name: LossName, outputs: list[list[float]], labels: list[int], loss: float, gradient: list[list[float]]
) -> None:
    logits = np.array(outputs, np.float32)
    assert LOSSES[name](logits, np.array(labels), logits) == pytest.approx(loss)
    np.testing.assert_allclose(logits, gradient)
