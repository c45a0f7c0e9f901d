from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from psgd.core.server import optimizers
from psgd.core.server.optimizers import Adagrad, DelayedNesterov, Optimizer, Sgd, build_optimizer, in_blocks
from psgd.spec import (
    AdagradOptimizer,
    AdamOptimizer,
    AdamwOptimizer,
    DelayedNesterovOptimizer,
    OptimizerSpec,
    SgdOptimizer,
)
from psgd_workers.messages import FloatArray

SIZE = 33
OURS_ALONE = {"name", "max_grad_norm", "clip_value", "schedule", "ema"}  # fields that torch's optimizers do not have
SGD = [
    SgdOptimizer(lr=lr, momentum=momentum, dampening=dampening, nesterov=nesterov, weight_decay=weight_decay)
    for momentum, dampening, nesterov, weight_decay, lr in product(
        (0.0, 0.9), (0.0, 0.3), (False, True), (0.0, 0.01), (0.1, 0.003)
    )
    if not nesterov or (momentum > 0 and dampening == 0)  # torch and psgd refuse the others
]
ADAGRAD = [
    AdagradOptimizer(name="adagrad", lr=0.1, initial_accumulator_value=value, weight_decay=weight_decay)
    for value, weight_decay in product((0.1, 1.0), (0.0, 0.01))
]
ADAM = [
    AdamOptimizer(name="adam", lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    for lr, betas, eps, weight_decay in product((0.1, 0.003), ((0.9, 0.999), (0.0, 0.9)), (1e-8, 1e-3), (0.0, 0.1))
]
ADAMW = [
    AdamwOptimizer(name="adamw", lr=lr, betas=betas, weight_decay=weight_decay)
    for lr, betas, weight_decay in product((0.1, 0.003), ((0.9, 0.999), (0.5, 0.9)), (0.0, 0.01, 0.3))
]
DELAYED_NESTEROV = [
    DelayedNesterovOptimizer(name="delayed_nesterov", lr=0.1, momentum=momentum, every=every)
    for momentum, every in product((0.0, 0.9), (1, 2, 7))
]
ALL: list[OptimizerSpec] = [*SGD, *ADAGRAD, *ADAM, *ADAMW, *DELAYED_NESTEROV]
STATEFUL: list[OptimizerSpec] = [
    SgdOptimizer(lr=0.1, momentum=0.9, weight_decay=0.01),
    SgdOptimizer(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    AdagradOptimizer(name="adagrad", lr=0.1),
    AdamOptimizer(name="adam", lr=0.1, weight_decay=0.01),
    AdamwOptimizer(name="adamw", lr=0.1),
    DelayedNesterovOptimizer(name="delayed_nesterov", lr=0.1, every=3),
]


def hyperparameters(spec: OptimizerSpec) -> str:
    """Return the id of a test's parameter."""
    return f"{spec.name} {spec.model_dump(exclude=OURS_ALONE)}"


def noisy_gradient(weights: NDArray[Any], step: int) -> NDArray[Any]:
    """Return a gradient that pulls towards 0, with seeded noise, in the precision of `weights`."""
    noise = np.random.default_rng(step).standard_normal(SIZE, dtype=np.float32)
    gradient: NDArray[Any] = np.linspace(0.1, 2, SIZE, dtype=np.float32) * weights + noise
    return gradient


def start() -> FloatArray:
    return np.linspace(-1, 1, SIZE, dtype=np.float32)


def run(optimizer: Optimizer, spec: OptimizerSpec, weights: FloatArray, steps: range) -> FloatArray:
    for step in steps:
        optimizer.step(weights, noisy_gradient(weights, step), spec.lr)
    return weights


def direction(optimizer: Optimizer, weights: FloatArray, gradient: FloatArray) -> FloatArray:
    """Return the u of the next step, as the watch function gets it."""
    shown = np.empty_like(weights)

    def watch(part: slice, direction: FloatArray) -> None:
        shown[part] = direction

    optimizer.step(weights.copy(), gradient, 0.1, watch)
    return shown


def psgd_weights(spec: OptimizerSpec, steps: int) -> FloatArray:
    return run(build_optimizer(spec, SIZE), spec, start(), range(steps))


def torch_optimizer(spec: OptimizerSpec, weights: torch.Tensor) -> torch.optim.Optimizer:
    """Build torch's optimizer of the same name, with the same hyperparameters."""
    build: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "sgd": torch.optim.SGD,
        "adagrad": torch.optim.Adagrad,
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
    }
    return build[spec.name]([weights], foreach=False, **spec.model_dump(exclude=OURS_ALONE))


def torch_weights(spec: OptimizerSpec, steps: int, dtype: torch.dtype) -> NDArray[Any]:
    weights = torch.from_numpy(start()).to(dtype).requires_grad_()
    optimizer = torch_optimizer(spec, weights)
    for step in range(steps):
        weights.grad = torch.from_numpy(noisy_gradient(weights.detach().numpy(), step))
        optimizer.step()
    result: NDArray[Any] = weights.detach().numpy()
    return result


@pytest.mark.parametrize("spec", [*SGD, *ADAGRAD, *ADAM, *ADAMW], ids=hyperparameters)
def test_200_steps_are_those_of_torch(spec: OptimizerSpec) -> None:
    # torch's AdamW rounds 1 - η·λ to float32, which takes it 6e-6 away from its own float64 result; psgd's does not.
    dtype = torch.float64 if isinstance(spec, AdamwOptimizer) else torch.float32
    theirs = torch_weights(spec, 200, dtype)
    assert np.abs(theirs).max() > 0.1
    error = np.linalg.norm(psgd_weights(spec, 200) - theirs)
    assert error <= 1e-6 * np.linalg.norm(theirs)  # torch's fused multiply-add changes single elements by more


@pytest.mark.parametrize("spec", ALL, ids=hyperparameters)
def test_a_step_is_the_direction_shown_times_the_rate_to_the_bit(spec: OptimizerSpec) -> None:
    first = build_optimizer(spec, SIZE)
    second = build_optimizer(spec, SIZE)
    weights = start()
    for step in range(8):
        gradient = noisy_gradient(weights, step)
        expected = weights - np.float32(0.3) * direction(first, weights, gradient)
        second.step(weights, gradient, 0.3)
        np.testing.assert_array_equal(weights, expected)


# Blocks


@pytest.mark.parametrize(("size", "block"), [(0, 4), (3, 4), (4, 4), (9, 4), (12, 4)])
def test_blocks_are_all_values_in_order(size: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "BLOCK", block)
    blocks = in_blocks(size)
    values = np.arange(size)
    parts = [values[block.part] for block in blocks]
    np.testing.assert_array_equal(np.concatenate([[], *parts]), values)
    for part, (_, scratch, spare) in zip(parts, blocks, strict=True):
        assert len(part) == len(scratch) == len(spare) <= block
        assert not np.shares_memory(scratch, spare)


@pytest.mark.parametrize("block", [1, 8, 11, SIZE - 1])  # SIZE is a multiple of 11: no shorter last block
@pytest.mark.parametrize("spec", ALL, ids=hyperparameters)
def test_many_blocks_make_the_step_of_one_to_the_bit(
    spec: OptimizerSpec, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build_optimizer(spec, SIZE)
    one = start()
    monkeypatch.setattr(optimizers, "BLOCK", block)
    blocked = build_optimizer(spec, SIZE)
    many = start()
    for step in range(8):
        gradient = noisy_gradient(one, step)
        np.testing.assert_array_equal(direction(blocked, many, gradient), direction(whole, one, gradient))
        for optimizer, weights in ((whole, one), (blocked, many)):
            optimizer.step(weights, gradient, spec.lr)
        assert many.tobytes() == one.tobytes()
        states = ({name: array.tobytes() for name, array in each.state().items()} for each in (whole, blocked))
        assert next(states) == next(states)


# Closed forms


def test_adagrads_eps_is_inside_the_root() -> None:
    spec = AdagradOptimizer(name="adagrad", lr=0.1, eps=0.75, initial_accumulator_value=0.25)
    optimizer = Adagrad(spec, 2)
    for squares in (1, 2, 3):  # sum of the squares of the gradients [1, 0]
        shown = direction(optimizer, np.zeros(2, np.float32), np.array([1, 0], np.float32))
        np.testing.assert_allclose(shown, [1 / np.sqrt(1 + squares), 0], rtol=1e-6)


def test_adagrads_first_step_is_by_the_sign() -> None:
    gradient = np.array([-3, -0.01, 0, 0.5, 100], np.float32)
    optimizer = Adagrad(AdagradOptimizer(name="adagrad", lr=0.1), 5)
    np.testing.assert_allclose(direction(optimizer, np.zeros(5, np.float32), gradient), np.sign(gradient), rtol=1e-6)


@pytest.mark.parametrize("spec", DELAYED_NESTEROV, ids=hyperparameters)
def test_delayed_nesterov_is_a_plain_loop(spec: DelayedNesterovOptimizer) -> None:
    weights = start().astype(np.float64)
    velocity = np.zeros(SIZE)
    seen = []
    for step in range(50):
        seen.append(noisy_gradient(weights, step))
        move = seen[-1] / spec.every
        if len(seen) % spec.every == 0:
            velocity = spec.momentum * velocity + np.mean(seen[-spec.every :], axis=0)
            move = move + spec.momentum * velocity
        weights = weights - spec.lr * move
    np.testing.assert_allclose(psgd_weights(spec, 50), weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_delayed_nesterov_without_delay_is_sgd_with_nesterov_to_the_bit(momentum: float) -> None:
    delayed = DelayedNesterovOptimizer(name="delayed_nesterov", lr=0.1, momentum=momentum, every=1)
    sgd = SgdOptimizer(lr=0.1, momentum=momentum, nesterov=True)
    np.testing.assert_array_equal(psgd_weights(delayed, 50), psgd_weights(sgd, 50))


def test_pushes_between_the_momentums_moves_step_by_their_share_alone() -> None:
    spec = DelayedNesterovOptimizer(name="delayed_nesterov", lr=0.1, momentum=0.5, every=4)
    optimizer = DelayedNesterov(spec, 1)
    moves = [float(direction(optimizer, np.zeros(1, np.float32), np.ones(1, np.float32))[0]) for _ in range(8)]
    assert moves == [0.25, 0.25, 0.25, 0.25 + 0.5, 0.25, 0.25, 0.25, 0.25 + 0.5 * 1.5]


# State


@pytest.mark.parametrize("steps_before", [0, 1, 5])
@pytest.mark.parametrize("spec", STATEFUL, ids=hyperparameters)
def test_loaded_state_continues_bit_for_bit(spec: OptimizerSpec, steps_before: int) -> None:
    undisturbed = psgd_weights(spec, steps_before + 5)
    first = build_optimizer(spec, SIZE)
    second = build_optimizer(spec, SIZE)
    weights = run(first, spec, start(), range(steps_before))
    state = {name: array.copy() for name, array in first.state().items()}
    second.load(state)
    run(second, spec, weights, range(steps_before, steps_before + 5))
    np.testing.assert_array_equal(weights, undisturbed)


@pytest.mark.parametrize("spec", STATEFUL, ids=hyperparameters)
def test_loading_forgets_what_was_before(spec: OptimizerSpec) -> None:
    used = build_optimizer(spec, SIZE)
    fresh = build_optimizer(spec, SIZE)
    run(used, spec, start(), range(4))
    used.load(fresh.state())
    np.testing.assert_array_equal(run(used, spec, start(), range(7)), psgd_weights(spec, 7))


@pytest.mark.parametrize("spec", STATEFUL, ids=hyperparameters)
def test_loaded_arrays_are_not_shared(spec: OptimizerSpec) -> None:
    first = build_optimizer(spec, SIZE)
    second = build_optimizer(spec, SIZE)
    run(first, spec, start(), range(4))
    before = {name: array.copy() for name, array in first.state().items()}
    assert before
    second.load(first.state())
    run(second, spec, start(), range(4))
    for name, array in first.state().items():
        np.testing.assert_array_equal(array, before[name])


def test_sgd_has_no_state_without_momentum() -> None:
    optimizer = Sgd(SgdOptimizer(lr=0.1, weight_decay=0.01), SIZE)
    optimizer.step(np.ones(SIZE, np.float32), np.ones(SIZE, np.float32), 0.1)
    assert optimizer.state() == {}


# Memory


@pytest.mark.parametrize("spec", ALL, ids=hyperparameters)
def test_gradients_may_be_read_only_and_are_left_as_they_are(spec: OptimizerSpec) -> None:
    optimizer = build_optimizer(spec, SIZE)
    gradient = noisy_gradient(start(), 0)
    weights = start()
    gradient.flags.writeable = False
    for _ in range(8):
        optimizer.step(weights, gradient, spec.lr)
    np.testing.assert_array_equal(gradient, noisy_gradient(start(), 0))


@pytest.mark.parametrize("spec", ALL, ids=hyperparameters)
def test_no_array_is_made_by_a_step(spec: OptimizerSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 100_000
    block = 30_000
    monkeypatch.setattr(optimizers, "BLOCK", block)
    optimizer = build_optimizer(spec, size)
    weights = np.ones(size, np.float32)
    gradient = np.ones(size, np.float32)
    tracemalloc.start()
    for _ in range(7):
        optimizer.step(weights, gradient, spec.lr)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < block  # bytes: a quarter of the size of one block
