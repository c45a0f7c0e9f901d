from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psgd.core.driver.workers import FIRST_LEASE, LEASE_S, LEAST_SILENCE_TIMEOUT_S, SILENCE_FACTOR, WorkerTable
from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.partitions import Partition
from psgd_workers.messages import Version
from tests.support.jobs import GRID, START, job

EMPTY = ParameterServer(job(), Partition(0, 0, 6, 6), START, GRID, Version(1, 0)).report()


@pytest.fixture
def worker_table() -> WorkerTable:
    worker_table = WorkerTable(3)
    for worker in worker_table.hire(3, now=0.0):
        worker_table.mark_up(worker.name, now=0.0)
    return worker_table


def test_a_successor_takes_the_slot_and_a_new_name(worker_table: WorkerTable) -> None:
    worker_table.remove("worker-1")
    assert not worker_table.complete
    assert [(worker.name, worker.slot) for worker in worker_table.hire(3, now=5.0)] == [("worker-3", 1)]
    assert [worker.name for worker in worker_table] == ["worker-0", "worker-3", "worker-2"]
    assert [worker.name for worker in worker_table.up] == ["worker-0", "worker-2"]
    assert worker_table.hire(3, now=6.0) == []


def test_no_more_are_hired_than_there_are_slots_or_wishes() -> None:
    worker_table = WorkerTable(3)
    assert len(worker_table.hire(1, now=0.0)) == 1
    assert len(worker_table.hire(worker_table.target, now=0.0)) == 2
    assert worker_table.hire(worker_table.target, now=0.0) == []
    assert WorkerTable(3).hire(0, now=0.0) == []


def test_homes_divide_the_shards_evenly(worker_table: WorkerTable) -> None:
    assert [worker_table.home(worker) * 3 for worker in worker_table] == [0, 1, 2]


def test_leases_are_sized_by_measured_time(worker_table: WorkerTable) -> None:
    worker = worker_table["worker-0"]
    assert worker_table.lease_size(worker) == FIRST_LEASE
    worker_table.granted(worker, 0, 10, now=1.0)
    worker_table.closed(worker, 0, now=2.0)
    assert worker.batch_s == pytest.approx(0.1)
    assert worker_table.lease_size(worker) == round(LEASE_S / 0.1)
    worker_table.granted(worker, 1, 10, now=2.0)
    worker_table.closed(worker, 1, now=5.0)
    assert worker.batch_s == pytest.approx(0.2)  # half the old, half the new


def test_a_slow_worker_still_gets_a_batch(worker_table: WorkerTable) -> None:
    worker = worker_table["worker-0"]
    worker_table.granted(worker, 0, 1, now=0.0)
    worker_table.closed(worker, 0, now=60.0)
    assert worker_table.lease_size(worker) == 1


def test_a_queued_lease_is_timed_from_the_end_of_the_one_before(worker_table: WorkerTable) -> None:
    worker = worker_table["worker-0"]
    worker_table.granted(worker, 0, 10, now=0.0)
    worker_table.granted(worker, 1, 10, now=0.5)
    worker_table.closed(worker, 0, now=1.0)
    worker_table.closed(worker, 1, now=2.0)
    assert worker.batch_s == pytest.approx(0.1)


def test_pushes_and_parking_are_signs_of_life(worker_table: WorkerTable) -> None:
    pushes = {"worker-0": 2, "worker-1": 0, "worker-2": 0, "gone": 4}
    worker_table.take_report(replace(EMPTY, worker_pushes=pushes, parked=frozenset({"worker-2"})), now=3.0)
    assert [worker.alive_at for worker in worker_table] == [3, 0, 3]
    worker_table.take_report(replace(EMPTY, worker_pushes=pushes, parked=frozenset({"worker-2"})), now=4.0)
    assert [worker.alive_at for worker in worker_table] == [3, 0, 4]


def test_another_partitions_count_is_no_sign_of_life(worker_table: WorkerTable) -> None:
    """Two servers' counts of one worker's pushes may differ for the whole run."""
    for now, partition, pushes in ((1.0, 0, 5), (2.0, 1, 4), (3.0, 0, 5), (4.0, 1, 4)):
        worker_table.take_report(replace(EMPTY, partition=partition, worker_pushes={"worker-0": pushes}), now)
    assert worker_table["worker-0"].alive_at == 2


def test_a_lease_that_was_not_done_to_its_end_teaches_nothing(worker_table: WorkerTable) -> None:
    worker = worker_table["worker-0"]
    worker_table.granted(worker, 0, 10, now=0.0)
    worker_table.closed(worker, 0, now=0.0, whole=False)
    assert worker_table.lease_size(worker) == FIRST_LEASE
    worker_table.granted(worker, 1, 10, now=0.0)
    worker_table.closed(worker, 1, now=0.0)  # a clock may stand still
    assert worker.batch_s
    assert worker_table.lease_size(worker) > 0


def test_patience_is_so_many_of_the_longest_batch_within_limits(worker_table: WorkerTable) -> None:
    worker = worker_table["worker-0"]
    assert worker_table.silence_timeout_s(worker, at_most=60.0) == 60
    for longest_s, silence_timeout_s in (
        (0.01, LEAST_SILENCE_TIMEOUT_S),
        (1.0, SILENCE_FACTOR),
        (0.5, SILENCE_FACTOR),
        (10.0, 60),
    ):
        worker_table.take_report(replace(EMPTY, longest_s=longest_s, worker_pushes={"worker-0": 1}), now=1.0)
        assert worker_table.silence_timeout_s(worker, at_most=60.0) == silence_timeout_s
    assert worker_table.silence_timeout_s(worker, at_most=4.0) == 4
    assert worker_table.silence_timeout_s(worker_table["worker-1"], at_most=60.0) == 60  # no push of it was heard


def test_beyond_the_target_those_that_are_not_up_leave_first_then_the_highest_slots(worker_table: WorkerTable) -> None:
    worker_table.remove("worker-0")
    worker_table.hire(3, now=1.0)
    worker_table.target = 1
    assert [worker.name for worker in worker_table.surplus()] == ["worker-3", "worker-2"]
    assert worker_table.surplus() == []
    assert list(worker_table.below_quota) == ["worker-1"]


def test_a_lease_of_short_batches_is_worth_the_turn_to_it() -> None:
    worker_table = WorkerTable(1)
    (worker,) = worker_table.hire(1, 0.0)
    assert worker_table.least_lease_size(worker) == 1
    for batch_s, batches in ((0.001, 30), (0.02, 2), (1.0, 1)):
        worker.batch_s = batch_s
        assert worker_table.least_lease_size(worker) == batches


CHANGES = st.lists(
    st.tuples(st.sampled_from(["grant", "close", "turn", "remove"]), st.integers(0, 2), st.floats(0.1, 2)),
    min_size=20,
    max_size=60,
)


@given(CHANGES)
def test_sums_over_workers_are_those_of_the_workers(changes: list[tuple[str, int, float]]) -> None:
    """Whatever happens, `all_unfinished` agrees with the workers' own numbers, and the parts of all make a whole."""
    table = WorkerTable(3)
    now = 1e6  # seconds: a machine that is up for days
    lease = 0
    for kind, number, seconds in changes:
        now += seconds
        for worker in table.hire(3, now):
            table.mark_up(worker.name, now)
        worker = list(table)[number]
        if kind == "grant":
            lease += 1
            # Long once the speed is known, so that no worker is overdue and the sum stays above 0.
            table.granted(worker, lease, batches=10_000 if worker.batch_s else 1, now=now)
        elif kind == "close" and worker.leases:
            table.closed(worker, next(iter(worker.leases)), now)
        elif kind == "turn":
            table.turn_to_lease(worker, now)
        elif kind == "remove":
            table.remove(worker.name)
        expected = 0.0
        for other in table:
            done = (now - other.lease_began) / other.batch_s if other.leases and other.batch_s else 0.0
            expected += sum(other.leases.values()) - done
        assert table.all_unfinished(now) == pytest.approx(max(0.0, expected), rel=1e-3, abs=1e-2)
        if all(other.batch_s for other in table.up) and len(table.up) == 3:
            assert sum(map(table.part, table.up)) == pytest.approx(1)
