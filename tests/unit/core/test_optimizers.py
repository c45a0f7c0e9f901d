from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch

from psgd.core.optimizers import Sgd, build_optimizer
from psgd.spec import SgdOptimizer
from psgd_workers.messages import FloatArray

SIZE = 33
COMBINATIONS = [
    (momentum, dampening, nesterov, weight_decay, lr)
    for momentum, dampening, nesterov, weight_decay, lr in product(
        (0.0, 0.9), (0.0, 0.3), (False, True), (0.0, 0.01), (0.1, 0.003)
    )
    if not nesterov or (momentum > 0 and dampening == 0)  # torch and we refuse the others
]


def curvature(weights: FloatArray, step: int) -> FloatArray:
    """A gradient that pulls towards 0, with seeded noise."""
    noise = np.random.default_rng(step).standard_normal(SIZE, dtype=np.float32)
    gradient: FloatArray = np.linspace(0.1, 2, SIZE, dtype=np.float32) * weights + noise
    return gradient


def ours(spec: SgdOptimizer, steps: int, gradient: Callable[[FloatArray, int], FloatArray]) -> FloatArray:
    weights = np.linspace(-1, 1, SIZE, dtype=np.float32)
    optimizer = Sgd(spec, SIZE)
    for step in range(steps):
        optimizer.step(weights, gradient(weights, step))
    return weights


def torchs(spec: SgdOptimizer, steps: int, gradient: Callable[[FloatArray, int], FloatArray]) -> FloatArray:
    weights = torch.from_numpy(np.linspace(-1, 1, SIZE, dtype=np.float32)).requires_grad_()
    optimizer = torch.optim.SGD(
        [weights],
        lr=spec.lr,
        momentum=spec.momentum,
        dampening=spec.dampening,
        nesterov=spec.nesterov,
        weight_decay=spec.weight_decay,
        foreach=False,
    )
    for step in range(steps):
        weights.grad = torch.from_numpy(gradient(weights.detach().numpy(), step))
        optimizer.step()
    result: FloatArray = weights.detach().numpy()
    return result


@pytest.mark.parametrize(("momentum", "dampening", "nesterov", "weight_decay", "lr"), COMBINATIONS)
def test_200_steps_of_sgd_are_those_of_torch(
    momentum: float, dampening: float, nesterov: bool, weight_decay: float, lr: float
) -> None:
    spec = SgdOptimizer(lr=lr, momentum=momentum, dampening=dampening, nesterov=nesterov, weight_decay=weight_decay)
    theirs = torchs(spec, 200, curvature)
    assert np.abs(theirs).max() > 0.1
    error = np.linalg.norm(ours(spec, 200, curvature) - theirs)
    assert error <= 1e-6 * np.linalg.norm(theirs)  # of the whole: single elements feel torch's fused multiply-add


@pytest.mark.parametrize("steps_before", [0, 1, 5])
@pytest.mark.parametrize("nesterov", [False, True])
def test_loaded_state_continues_bit_for_bit(steps_before: int, nesterov: bool) -> None:
    spec = SgdOptimizer(lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.01)
    undisturbed = ours(spec, steps_before + 5, curvature)
    weights = np.linspace(-1, 1, SIZE, dtype=np.float32)
    first, second = build_optimizer(spec, SIZE), build_optimizer(spec, SIZE)
    for step in range(steps_before):
        first.step(weights, curvature(weights, step))
    state = {name: array.copy() for name, array in first.state().items()}
    second.load(state)
    for step in range(steps_before, steps_before + 5):
        second.step(weights, curvature(weights, step))
    np.testing.assert_array_equal(weights, undisturbed)


def test_loaded_arrays_are_not_shared() -> None:
    spec = SgdOptimizer(lr=0.1, momentum=0.9)
    optimizer = Sgd(spec, SIZE)
    velocity = np.ones(SIZE, np.float32)
    optimizer.load({"velocity": velocity})
    optimizer.step(np.zeros(SIZE, np.float32), np.ones(SIZE, np.float32))
    np.testing.assert_array_equal(velocity, 1)


def test_there_is_no_state_without_momentum() -> None:
    optimizer = Sgd(SgdOptimizer(lr=0.1, weight_decay=0.01), SIZE)
    optimizer.step(np.ones(SIZE, np.float32), np.ones(SIZE, np.float32))
    assert optimizer.state() == {}


@pytest.mark.parametrize(("momentum", "dampening", "nesterov", "weight_decay", "lr"), COMBINATIONS)
def test_gradients_may_be_read_only_and_stay_as_they_are(
    momentum: float, dampening: float, nesterov: bool, weight_decay: float, lr: float
) -> None:
    spec = SgdOptimizer(lr=lr, momentum=momentum, dampening=dampening, nesterov=nesterov, weight_decay=weight_decay)
    optimizer = Sgd(spec, SIZE)
    gradient = np.ones(SIZE, np.float32)
    gradient.flags.writeable = False
    weights = np.zeros(SIZE, np.float32)
    for _ in range(3):
        optimizer.step(weights, gradient)
    np.testing.assert_array_equal(gradient, 1)
