"""Whole runs of the coordinator: how batches are leased, shared and leased again."""

from __future__ import annotations

from collections import Counter
from math import inf

import numpy as np
import pytest
from numpy.typing import NDArray

from psgd.core.driver.coordinator import COMPANY_S
from psgd.core.driver.events import AskReport, Cancel, Event, Grant
from psgd.core.driver.workers import WorkerTable
from psgd.core.server.journal import RecordKind
from psgd.simulation.cluster import VirtualCluster
from psgd.simulation.observer import ClusterObserver
from psgd_workers.messages import EpochGrid
from tests.support.coordinator_runs import assert_exactly_once, leased, notes, run
from tests.support.in_process import START_S, EachStep, Fault


@pytest.mark.parametrize("mode", ["async", "bsp"])
@pytest.mark.parametrize(("batches", "limit"), [(400, {"epochs": 1}), (9999, {"max_updates": 400})])
def test_workers_of_one_speed_are_kept_busy(mode: str, batches: int, limit: dict[str, int]) -> None:
    seconds = 0.01
    if mode == "bsp" and "max_updates" in limit:
        limit = {"max_updates": 100}
    host = run(mode, 4, EpochGrid((batches,), batches), compute_s=lambda worker, batch: seconds, run=limit)
    ideal = START_S + seconds * 400 / 4
    last = host.servers[0].report().last
    assert last
    assert last.now <= ideal + 0.1


def test_a_worker_has_one_lease_queued_ahead_and_no_more() -> None:
    most: list[int] = []

    def look(cluster: VirtualCluster) -> None:
        most.append(max((worker.leases for worker in cluster.status.workers), default=0))

    run(observers=[EachStep(look)])
    assert max(most) == 2


def test_a_slow_worker_gets_less() -> None:
    grid = EpochGrid((500,), 500)
    host = run(grid=grid, compute_s=lambda worker, batch: 0.2 if worker == "worker-0" else 0.02)
    share = Counter(applied.worker for applied in host.applied)
    assert share["worker-1"] > 3 * share["worker-0"] > 0


def test_leases_shrink_towards_an_epochs_end() -> None:
    sizes = [len(lease) for lease in leased(run(workers=2, compute_s=lambda w, b: 0.02).did(Grant))]
    assert sizes[0] > 4 * sizes[-1]


@pytest.mark.parametrize("batch_s", [0.005, 0.05, 2.0])  # the shortest lease has 6 batches, or 1
def test_workers_are_left_out_only_if_they_would_get_nothing(batch_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def grants() -> list[tuple[float, Grant]]:
        times = np.random.default_rng(0)
        host = run(
            workers=6,
            grid=EpochGrid((400,), 400),
            run={"epochs": 3},
            compute_s=lambda worker, batch: batch_s * float(times.lognormal()),
            lease_s=40 * batch_s,
        )
        return host.did(Grant)

    found = grants()
    monkeypatch.setattr(WorkerTable, "share_s", lambda table, batches: inf)  # the size of every lease is computed
    assert found == grants()


class KeptJournal(ClusterObserver):
    """Keeps the records of a run."""

    def __init__(self) -> None:
        self.records: list[NDArray[np.void]] = []

    def journalled(self, cluster: VirtualCluster, partition: int, records: NDArray[np.void]) -> None:
        self.records.append(records)


@pytest.mark.parametrize("slow_s", [0.01, 0.023])
def test_workers_end_an_epoch_together(slow_s: float) -> None:
    grid = EpochGrid((600,), 600)
    speeds = {"worker-0": 0.01, "worker-1": 0.01, "worker-2": slow_s}
    journal = KeptJournal()
    host = run(workers=3, grid=grid, run={"epochs": 3}, compute_s=lambda w, b: speeds[w], observers=[journal])
    assert_exactly_once(host, 3, grid)
    pushes = np.concatenate(journal.records)
    pushes = pushes[pushes["kind"] == RecordKind.PUSH]
    for epoch in (1, 2):  # when the speeds are known
        ends = {push["worker"]: push["now"] for push in pushes if push["epoch"] == epoch}
        assert len(ends) == 3
        assert max(ends.values()) - min(ends.values()) <= 2 * slow_s


def test_a_worker_that_is_late_finds_its_share() -> None:
    """The first worker up must not lease all of a short epoch."""
    late = COMPANY_S + 0.3  # training begins without it
    seconds = 0.005
    grid = EpochGrid((200,), 200)
    starts = {"worker-1": START_S + late}
    host = run(grid=grid, compute_s=lambda w, b: seconds, start_s=lambda worker: starts.get(worker, START_S))
    assert_exactly_once(host, 1, grid)
    assert min(at for at, grant in host.did(Grant) if grant.worker == "worker-1") == START_S + late
    last = host.servers[0].report().last
    assert last
    assert last.now <= START_S + late + (200 * seconds - 0.3) / 2 + 0.1
    assert notes(host, "taken_over") == []  # too little work is left to share


def test_a_short_run_waits_for_workers_that_come_soon() -> None:
    grid = EpochGrid((20,), 20)
    late = 0.8 * COMPANY_S
    starts = {"worker-1": START_S + late}
    host = run(grid=grid, compute_s=lambda w, b: 0.01, start_s=lambda worker: starts.get(worker, START_S))
    assert_exactly_once(host, 1, grid)
    assert {at for at, _ in host.did(Grant)[:2]} == {START_S + late}
    assert {grant.worker for _, grant in host.did(Grant)} == {"worker-0", "worker-1"}


@pytest.mark.parametrize("mode", ["async", "bsp"])
def test_the_driver_sleeps_until_a_late_worker_is_up(mode: str) -> None:
    starts = {"worker-1": START_S + COMPANY_S + 5}
    grid = EpochGrid((40,), 40)
    events: list[Event] = []

    class Events(ClusterObserver):
        def event_received(self, cluster: VirtualCluster, event: Event) -> None:
            if cluster.now < starts["worker-1"]:
                events.append(event)

    host = run(mode, 2, grid, start_s=lambda worker: starts.get(worker, START_S), observers=[Events()])
    assert_exactly_once(host, 1, grid)
    assert len(events) < 100


def test_a_worker_that_joins_shares_what_is_on_lease() -> None:
    """The speed of the new worker has not been measured yet."""
    grid = EpochGrid((100,), 100)
    host = run(
        scaling={"workers": {"min": 1, "max": 2}},
        grid=grid,
        compute_s=lambda w, b: 0.1,
        start_s=lambda worker: START_S + (6.0 if worker == "worker-1" else 0.0),
        lease_s=20.0,
    )
    assert_exactly_once(host, 1, grid)
    (note,) = notes(host, "taken_over")
    assert (note["worker"], note["by"]) == ("worker-0", "worker-1")
    last = host.servers[0].report().last
    assert last
    assert last.now <= START_S + 6.0 + 4.0 / 2 + 0.5


def test_a_slow_workers_last_batches_are_shared_and_it_is_called_off_at_the_end() -> None:
    grid = EpochGrid((60,), 60)
    slow = {"worker-0": 1.0, "worker-1": 0.05}
    host = run(grid=grid, run={"epochs": 2}, compute_s=lambda worker, batch: slow[worker])
    assert_exactly_once(host, 2, grid)
    assert notes(host, "taken_over")
    assert {cancel.worker for _, cancel in host.did(Cancel)} >= {"worker-0"}
    assert host.now < START_S + 12  # worker-0 alone would take 16 s for its first lease


def test_what_reached_the_server_is_not_leased_again() -> None:
    before, after = (run(workers=1, faults=[Fault("worker-0", 15, kind)]) for kind in ("before", "after"))
    assert before.status.ledger.requeued == after.status.ledger.requeued + 1
    assert after.status.ledger.duplicates == 0


def test_a_push_that_arrives_after_its_batch_was_leased_again_is_a_duplicate() -> None:
    host = run(faults=[Fault("worker-0", 3, "late")], compute_s=lambda worker, batch: 0.02)
    assert_exactly_once(host, 1)
    assert host.status.ledger.duplicates == 1


def test_a_worker_gets_nothing_until_its_failed_lease_is_settled() -> None:
    host = run(workers=1, faults=[Fault("worker-0", 7, "lane")])
    failed_at = START_S + 8 * 0.05
    again = min(at for at, _ in host.did(Grant) if at > failed_at)
    assert any(failed_at < at < again and not ask.wait for at, ask in host.did(AskReport))
    assert_exactly_once(host, 1)
    assert (host.status.ledger.duplicates, host.status.charged_failures) == (0, 0)
