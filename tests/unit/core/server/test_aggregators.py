from __future__ import annotations

import json
from collections.abc import Callable
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psgd.core.server.aggregators import Aggregator, OneGradient, RoundMean, RunningMean, Step, StepMember
from psgd.core.server.tables import RingleaderTables, TableMean
from tests.support.contributions import SIZE, TRAINABLE, randoms, scaled, step_on, taken

RUNNING: list[Callable[[int, int], Aggregator]] = [RunningMean, TableMean, RingleaderTables]
EVERY: list[Callable[[int, int], Aggregator]] = [OneGradient, RoundMean, *RUNNING]


# All aggregators


@pytest.mark.parametrize("kind", EVERY)
def test_one_gradient_is_its_own_mean_to_the_bit(kind: Callable[[int, int], Aggregator]) -> None:
    aggregator = kind(SIZE, TRAINABLE)
    for number in range(3):
        step = step_on(aggregator, [taken(number, read=number, examples=5)])
        np.testing.assert_array_equal(step.gradient, randoms(number))
        assert (step.weight, step.members, len(aggregator)) == (1.0, [StepMember(number, 5)], 0)


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("scale", [0.25, 1.0])
def test_buffers_are_not_clipped(kind: Callable[[int, int], Aggregator], scale: float) -> None:
    step = step_on(kind(SIZE, TRAINABLE), [taken(0, scale=scale)])
    np.testing.assert_array_equal(step.gradient, scaled(0, scale).astype(np.float32))


@pytest.mark.parametrize("kind", EVERY)
def test_what_is_taken_is_left_as_it_is(kind: Callable[[int, int], Aggregator]) -> None:
    aggregator = kind(SIZE, TRAINABLE)
    for number in range(2):
        gradient = taken(number, scale=0.5, weight=0.5)
        gradient.values.flags.writeable = False
        step_on(aggregator, [gradient])


@pytest.mark.parametrize("kind", [RoundMean, RunningMean, TableMean])
def test_a_round_holds_only_what_came_since_the_last(kind: Callable[[int, int], Aggregator]) -> None:
    aggregator = kind(SIZE, TRAINABLE)
    step_on(aggregator, [taken(number, "ab"[number % 2]) for number in range(4)])
    for number in (4, 5):
        assert len(aggregator) == number - 4
        aggregator.add(taken(number, "cd"[number % 2]))
    step = aggregator.close()
    np.testing.assert_allclose(step.gradient, (scaled(4, 1) + scaled(5, 1)) / 2, rtol=1e-6)
    assert len(step.members) == 2


def test_only_what_is_kept_is_in_no_state() -> None:
    assert [kind(SIZE, TRAINABLE).keeps for kind in EVERY] == [False, True, False, False, False]


# One gradient


def test_one_gradient_is_not_copied_unless_it_is_scaled() -> None:
    aggregator = OneGradient(SIZE, TRAINABLE)
    gradient = taken(0)
    assert step_on(aggregator, [gradient]).gradient is gradient.values
    assert step_on(aggregator, [gradient._replace(scale=0.5)]).gradient is not gradient.values


def test_a_second_gradient_is_a_bug_of_the_caller() -> None:
    aggregator = OneGradient(SIZE, TRAINABLE)
    aggregator.add(taken(0))
    with pytest.raises(AssertionError, match="closed after each gradient"):
        aggregator.add(taken(1))


@pytest.mark.parametrize("kind", [OneGradient, RunningMean])
def test_a_weight_is_the_rates_business(kind: Callable[[int, int], Aggregator]) -> None:
    step = step_on(kind(SIZE, TRAINABLE), [taken(0, weight=0.25)])
    assert step.weight == 0.25
    np.testing.assert_array_equal(step.gradient, randoms(0))


# Rounds


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_a_round_is_summed_in_the_batches_order_whatever_the_order_of_arrival(order: tuple[int, ...]) -> None:
    step = step_on(RoundMean(SIZE, TRAINABLE), [taken(number, read=number) for number in order])
    np.testing.assert_array_equal(step.gradient, ((randoms(0) + randoms(1)) + randoms(2)) / np.float32(3))
    assert step.members == [StepMember(number, 1) for number in range(3)]


@given(st.lists(st.tuples(st.integers(1, 64), st.floats(0.01, 1)), min_size=1, max_size=8), st.randoms())
def test_a_round_is_weighted_by_examples(gradients: list[tuple[int, float]], random: Any) -> None:
    round_ = [taken(n, examples=examples, scale=scale) for n, (examples, scale) in enumerate(gradients)]
    random.shuffle(round_)
    step = step_on(RoundMean(SIZE, TRAINABLE), round_)
    total = sum(examples for examples, _ in gradients)
    expected = sum(examples * scaled(n, scale) for n, (examples, scale) in enumerate(gradients)) / total
    np.testing.assert_allclose(step.gradient, expected, rtol=1e-5, atol=1e-6)
    assert step.weight == 1
    assert sum(member.examples for member in step.members) == total


@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)), min_size=1, max_size=8))
def test_a_running_mean_steps_by_the_sum_of_weighted_gradients_over_their_number(
    gradients: list[tuple[float, float]],
) -> None:
    members = [taken(n, scale=scale, weight=weight) for n, (scale, weight) in enumerate(gradients)]
    step = step_on(RunningMean(SIZE, TRAINABLE), members)
    weighted = sum(weight * scaled(n, scale) for n, (scale, weight) in enumerate(gradients))
    weights = sum(weight for _, weight in gradients)
    np.testing.assert_allclose(step.gradient, weighted / weights, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(step.weight * step.gradient, weighted / len(gradients), rtol=1e-4, atol=1e-6)


# State


@pytest.mark.parametrize("before", range(10))
@pytest.mark.parametrize("kind", RUNNING)
def test_a_round_goes_on_bit_for_bit_in_another_aggregator(kind: Callable[[int, int], Aggregator], before: int) -> None:
    first = kind(SIZE, TRAINABLE)
    second = kind(SIZE, TRAINABLE)
    steps: list[list[Step]] = [[], []]

    def push(target: Aggregator, number: int, into: list[Step]) -> None:
        weight = 1.0 if isinstance(target, RingleaderTables) else 1 / (1 + number)
        target.add(taken(number, "abbcacc"[number % 7], read=number, weight=weight))
        target.set_live(set("abc"))
        if target.owes_step() if isinstance(target, RingleaderTables) else number % 5 == 4:
            step = target.close()
            into.append(step._replace(gradient=step.gradient.copy()))

    for number in range(before):
        push(first, number, [])
    arrays, metadata = first.state()
    copied = {name: array.copy() for name, array in arrays.items()}
    second.load(arrays, json.loads(json.dumps(metadata)))
    assert len(second) == len(first)
    for number in range(before, before + 12):
        for target, into in zip((first, second), steps, strict=True):
            push(target, number, into)
    assert len(steps[0]) == len(steps[1]) > 1
    for ours, theirs in zip(*steps, strict=True):
        np.testing.assert_array_equal(ours.gradient, theirs.gradient)
        assert (ours.weight, ours.members) == (theirs.weight, theirs.members)
    for name, array in arrays.items():  # a state is a copy
        np.testing.assert_array_equal(array, copied[name])


@pytest.mark.parametrize("kind", [OneGradient, RoundMean, RunningMean])
def test_between_rounds_there_is_nothing_to_save(kind: Callable[[int, int], Aggregator]) -> None:
    aggregator = kind(SIZE, TRAINABLE)
    step_on(aggregator, [taken(0)])
    assert aggregator.state() == ({}, {})
    aggregator.load({}, {})
    assert len(aggregator) == 0
