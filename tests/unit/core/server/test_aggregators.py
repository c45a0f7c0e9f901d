from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from psgd.core.server.aggregators import (
    Aggregator,
    Contribution,
    OneGradient,
    RingleaderTables,
    RoundMean,
    RunningMean,
    Step,
    StepMember,
    TableMean,
)
from psgd_workers.messages import BatchId, FloatArray

SIZE = 6
TRAINABLE = 4  # two buffers follow
RUNNING: list[Callable[[int, int], Aggregator]] = [RunningMean, TableMean, RingleaderTables]
EVERY: list[Callable[[int, int], Aggregator]] = [OneGradient, RoundMean, *RUNNING]

Float64 = NDArray[np.float64]


def randoms(*seed: int) -> FloatArray:
    return np.random.default_rng(seed).standard_normal(SIZE, dtype=np.float32)


def taken(
    number: int, worker: str = "a", *, examples: int = 1, read: int = 0, scale: float = 1.0, weight: float = 1.0
) -> Contribution:
    """Return the random gradient of batch `number`."""
    return Contribution(worker, BatchId(0, 0, number), StepMember(read, examples), randoms(number), scale, weight)


def scaled(number: int, scale: float) -> Float64:
    """Return the gradient of batch `number` with its trained values scaled, and its buffers unchanged."""
    factors: Float64 = np.array([scale] * TRAINABLE + [1.0] * (SIZE - TRAINABLE))
    return randoms(number) * factors


def step_on(aggregator: Aggregator, gradients: Sequence[Contribution]) -> Step:
    for gradient in gradients:
        aggregator.add(gradient)
    return aggregator.close()


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


# Tables


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=12))
def test_a_table_is_the_mean_of_the_workers_means(workers: list[str]) -> None:
    step = step_on(TableMean(SIZE, TRAINABLE), [taken(n, worker, read=n) for n, worker in enumerate(workers)])
    means = [
        np.mean([scaled(n, 1) for n, pushed in enumerate(workers) if pushed == worker], axis=0)
        for worker in set(workers)
    ]
    np.testing.assert_allclose(step.gradient, np.mean(means, axis=0), rtol=1e-5, atol=1e-6)
    assert (step.weight, step.members) == (1.0, [StepMember(n, 1) for n in range(len(workers))])


# Ringleader


class Paper:
    """Ringleader as its authors wrote it: a worker and its gradient go in, the table of a step or None comes out."""

    def __init__(self, workers: str) -> None:
        self._workers = workers
        self._table = self._fresh_table()
        self._next = self._fresh_table()
        self._to_update: set[str] = set()  # S in the paper; empty during phase 1

    def _fresh_table(self) -> dict[str, list[int]]:
        return {worker: [] for worker in self._workers}

    def push(self, worker: str, number: int) -> dict[str, list[int]] | None:
        """Add a gradient. Return worker -> numbers of its gradients in the step that is due now, or None."""
        if not self._to_update:  # phase 1: wait for a gradient of every worker
            self._table[worker].append(number)
            if not all(self._table.values()):
                return None
            self._to_update = set(self._workers)  # phase 2: exactly one update for each worker
        elif worker in self._to_update:
            self._table[worker].append(number)
        else:
            self._next[worker].append(number)
            return None
        table = {name: list(numbers) for name, numbers in self._table.items()}
        self._to_update.remove(worker)
        if not self._to_update:
            self._table, self._next = self._next, self._fresh_table()
        return table


def mean_of(table: dict[str, list[int]]) -> Float64:
    """Return (1/n) Σ Gᵢ / bᵢ."""
    means = [np.mean([scaled(n, 1) for n in numbers], axis=0) for numbers in table.values()]
    mean: Float64 = np.mean(means, axis=0)
    return mean


@st.composite
def turns(draw: st.DrawFn) -> tuple[str, list[str]]:
    """Draw the workers, and the order of their pushes."""
    workers = "abcdef"[: draw(st.integers(1, 6))]
    return workers, draw(st.lists(st.sampled_from(workers), max_size=60))


@given(turns())
def test_the_ring_is_the_papers_algorithm(given_turns: tuple[str, list[str]]) -> None:
    workers, pushers = given_turns
    paper = Paper(workers)
    reads = dict.fromkeys(workers, 0)
    version = 0
    pending = list[int]()
    staleness: list[int] = []
    tables = RingleaderTables(SIZE, TRAINABLE)
    read_at = dict[int, int]()  # number of a gradient -> version that it was computed from
    for number, worker in enumerate(pushers):
        pending.append(number)
        read_at[number] = reads[worker]
        tables.add(taken(number, worker, read=reads[worker]))
        table = paper.push(worker, number)
        tables.set_live(set(workers))
        assert tables.owes_step() == (table is not None)
        if table is not None:
            step = tables.close()
            np.testing.assert_allclose(step.gradient, mean_of(table), rtol=1e-4, atol=1e-5)
            assert step.weight == 1
            held = {n for numbers in table.values() for n in numbers}
            staleness += [version - read_at[n] for n in held]
            assert step.members == [StepMember(read_at[n], 1) for n in pending if n in held]
            pending = [n for n in pending if n not in held]
            version += 1
        assert len(tables) == len(pending)
        tables.set_live(set(workers))
        assert not tables.owes_step()
        reads[worker] = version
    assert max(staleness, default=0) <= 2 * len(workers) - 2


def test_the_ring_owes_each_worker_one_step_on_each_table() -> None:
    tables = RingleaderTables(SIZE, TRAINABLE)
    made = ""
    for number, worker in enumerate("abbcaccbabc"):
        tables.add(taken(number, worker))
        tables.set_live(set("abc"))
        due = tables.owes_step()
        made += "x" if due else "."
        if due:
            tables.close()
    # c completes the first table, then a and b are owed a step; meanwhile two gradients of c go to the next table. b
    # completes that one, and c is owed a step.
    assert made == "...xx..x.xx"


def test_who_leaves_is_owed_nothing_and_awaited_no_more() -> None:
    tables = RingleaderTables(SIZE, TRAINABLE)
    tables.add(taken(0, "a"))
    tables.set_live({"a", "b"})
    assert not tables.owes_step()
    tables.set_live({"a"})
    assert tables.owes_step()  # b has left, so that a completes the table
    np.testing.assert_array_equal(tables.close().gradient, randoms(0))


def test_the_next_table_is_looked_at_when_the_last_one_owed_leaves() -> None:
    tables = RingleaderTables(SIZE, TRAINABLE)
    for number, worker in enumerate("ab"):
        tables.add(taken(number, worker))
    tables.set_live({"a", "b"})
    assert tables.owes_step()
    tables.close()  # a is owed the next step
    tables.add(taken(2, "b"))
    tables.set_live({"a", "b"})
    assert not tables.owes_step()
    tables.set_live({"b"})
    assert tables.owes_step()  # a has left: the next table, with b alone, is complete
    step = tables.close()
    np.testing.assert_array_equal(step.gradient, randoms(2))
    assert (len(step.members), len(tables)) == (1, 0)


def test_at_an_end_the_ring_steps_on_what_no_step_holds() -> None:
    tables = RingleaderTables(SIZE, TRAINABLE)
    for number, worker in enumerate("ab"):
        tables.add(taken(number, worker))
    tables.set_live({"a", "b"})
    assert tables.owes_step()
    tables.close()
    tables.add(taken(2, "b"))
    np.testing.assert_array_equal(tables.close().gradient, randoms(2))
    tables.add(taken(3, "a"))
    np.testing.assert_array_equal(tables.close().gradient, randoms(3))
    assert len(tables) == 0


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


@pytest.mark.parametrize("kind", [TableMean, RingleaderTables])
def test_tables_are_summed_in_one_order_whatever_order_storage_gives_them_back_in(
    kind: Callable[[int, int], Aggregator],
) -> None:
    first = kind(SIZE, TRAINABLE)
    second = kind(SIZE, TRAINABLE)
    for number, worker in enumerate(("w-9", "w-1", "w-10", "w-4", "w-2")):
        first.add(taken(number, worker, weight=10.0**number))
    arrays, metadata = first.state()
    second.load(dict(sorted(arrays.items())), json.loads(json.dumps(metadata)))
    np.testing.assert_array_equal(second.close().gradient, first.close().gradient)
