from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psgd.core.server.aggregators import Aggregator, StepMember
from psgd.core.server.tables import RingleaderTables, TableMean
from tests.support.contributions import SIZE, TRAINABLE, Float64, randoms, scaled, step_on, taken

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
