from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import count, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psgd.core.driver.checkpoint_schedule import PAUSES_S
from psgd.core.driver.coordinator import INTERRUPT_S, Coordinator
from psgd.core.driver.events import (
    Action,
    AskReport,
    Cancel,
    Change,
    Commit,
    Evaluate,
    Finish,
    Grant,
    Note,
    Reported,
    Save,
    Scale,
    ServerLost,
    Skip,
    Started,
    StartServer,
    StartWorker,
    Stop,
    StopWorker,
    Tick,
    WorkerLost,
)
from psgd.core.driver.workers import EVALUATION_FACTOR, LEAST_SILENCE_TIMEOUT_S
from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.partitions import Partition
from psgd.result import LedgerCounts
from psgd.simulation.cluster import VirtualCluster
from psgd.simulation.observer import ClusterObserver
from psgd.simulation.problem import Timing
from psgd_workers.errors import WorkerError
from psgd_workers.messages import BatchId, EpochGrid, Evaluation, FloatArray, Lease, Version
from tests.support.in_process import EVALUATE_S, START_S, EachStep, Fault, FaultKind, InProcess
from tests.support.jobs import START, job, push, quadratic

GRID = EpochGrid((37, 36), 73)
SIZE = GRID.num_batches
FAULTS: list[FaultKind] = ["before", "after", "late", "silent", "lane"]
SECTIONS = ("run", "optimizer", "checkpoint", "failure", "scaling")

Speeds = Callable[[str, BatchId], float]


def speeds(seed: int) -> Speeds:
    """Every batch takes a time of its own, and some workers are up to ten times as slow as others."""

    def seconds(worker: str, batch: BatchId) -> float:
        slot = int(worker.removeprefix("worker-"))
        pace = 10 ** np.random.default_rng([seed, slot]).random()
        return float(0.01 * pace * (0.5 + np.random.default_rng([seed, slot, *batch]).random()))

    return seconds


def run(mode: str = "async", workers: int = 2, grid: EpochGrid = GRID, **options: Any) -> InProcess:
    """A run to its end; keywords that are no sections of a spec go to the host."""
    sections = {name: options.pop(name) for name in SECTIONS if name in options}
    gradient = options.pop("gradient", quadratic)
    return InProcess(job(mode, workers, **sections), grid, START, gradient, **options).run()


def assert_exactly_once(host: InProcess, epochs: int, grid: EpochGrid = GRID) -> None:
    everything = [grid.batch(epoch, position) for epoch in range(epochs) for position in range(grid.num_batches)]
    assert Counter(applied.batch for applied in host.applied) == Counter(everything)
    for server in host.servers.values():
        assert (server.epochs, server.report().pushes["applied"]) == (epochs, len(everything))


def validate(weights: FloatArray) -> Evaluation:
    """A loss that names the weights."""
    return Evaluation(float(weights.sum()), None, 1)


def validations(host: InProcess) -> dict[int, Evaluation | None]:
    """Every complete epoch's validation."""
    return {epoch.epoch: epoch.validation for epoch in host.status.recent_epochs}


# Epochs


@settings(max_examples=25)
@given(st.sampled_from(["async", "bsp"]), st.integers(1, 4), st.integers(0, 2**32))
def test_every_batch_of_every_epoch_is_applied_exactly_once(mode: str, workers: int, seed: int) -> None:
    host = run(mode, workers, run={"epochs": 2}, compute_s=speeds(seed), evaluate=validate)
    assert host.finish == Finish("finished")
    assert_exactly_once(host, 2)
    twice = host.status.ledger.duplicates  # where an idle worker took over from a slow one
    assert host.status.ledger == LedgerCounts(2 * SIZE, 2 * SIZE, twice, 0, 0)
    assert not twice or mode == "async"
    assert (host.status.epochs, host.status.updates) == (2, host.servers[0].version.updates)


@pytest.mark.parametrize("mode", ["async", "bsp"])
def test_an_epoch_of_one_batch_trains(mode: str) -> None:
    one = EpochGrid((1,), 1)
    host = run(mode, 3, one, run={"epochs": 4})
    assert host.finish == Finish("finished")
    assert_exactly_once(host, 4, one)


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


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_round_r_of_bsp_consists_of_the_epochs_positions_from_r_times_n_on(workers: int) -> None:
    host = run("bsp", workers, run={"epochs": 2}, compute_s=speeds(7))
    rounds_per_epoch = -(-SIZE // workers)
    for applied in host.applied:
        epoch, in_epoch = divmod(applied.after.updates - 1, rounds_per_epoch)
        assert applied.batch.epoch == epoch
        assert GRID.position(applied.batch) // workers == in_epoch
        assert applied.read == applied.after._replace(updates=applied.after.updates - 1)


# Limits


@settings(max_examples=40)
@given(st.sampled_from(["async", "bsp"]), st.integers(1, 4), st.integers(1, 150), st.integers(0, 2**32))
def test_max_updates_is_met_exactly(mode: str, workers: int, updates: int, seed: int) -> None:
    host = run(mode, workers, run={"max_updates": updates}, compute_s=speeds(seed))
    assert host.finish == Finish("finished")
    assert host.servers[0].version.updates == updates == host.checkpoints[-1].updates


@settings(max_examples=20)
@given(st.sampled_from([kind for kind in FAULTS if kind != "late"]), st.integers(0, 5), st.integers(1, 60))
def test_max_updates_of_async_is_met_exactly_whatever_dies(kind: FaultKind, pushes: int, updates: int) -> None:
    host = run(run={"max_updates": updates}, faults=[Fault("worker-0", pushes, kind)], failure={"timeout_s": 2.0})
    assert host.finish == Finish("finished")
    assert host.servers[0].version.updates == updates


@pytest.mark.parametrize("mode", ["async", "bsp"])
def test_max_time_ends_a_run_in_good_order(mode: str) -> None:
    host = run(mode, run={"max_time_s": 3.0})
    assert host.finish == Finish("finished")
    assert host.status.began is not None
    assert host.status.began + 3 <= host.now <= host.status.began + 3.2
    assert host.checkpoints[-1].updates == host.servers[0].version.updates
    assert host.status.open_leases == 0


def test_a_validation_target_ends_the_run_after_the_epoch_that_reached_it() -> None:
    accuracies = (0.1 * epoch for epoch in count(1))
    target = {"metric": "val/accuracy", "value": 0.35}
    host = run(run={"epochs": 100, "target": target}, evaluate=lambda w: Evaluation(1.0, next(accuracies), 1))
    assert host.finish == Finish("finished")
    assert 4 <= host.status.epochs <= 5  # the next epoch trains while the last one is evaluated


def test_a_training_loss_target_needs_no_validation() -> None:
    losses: dict[int, float] = {}

    def falling(batch: BatchId, weights: FloatArray, out: FloatArray) -> float:
        quadratic(batch, weights, out)
        return losses.setdefault(batch.epoch, 1 / (1 + batch.epoch))

    host = run(run={"epochs": 100, "target": {"metric": "train/loss", "value": 0.3}}, gradient=falling)
    assert host.finish == Finish("finished")
    assert 4 <= host.status.epochs <= 5
    assert len(losses) <= 5


@settings(max_examples=20)
@given(st.integers(0, 5), st.integers(1, 60), st.integers(2, 4))
def test_a_dead_workers_late_push_may_be_one_update_too_many(pushes: int, updates: int, workers: int) -> None:
    faults = [Fault("worker-0", pushes, "late")]
    host = run(workers=workers, run={"max_updates": updates}, faults=faults)
    assert host.servers[0].version.updates in (updates, updates + 1)


# Stopping


@pytest.mark.parametrize("mode", ["async", "bsp"])
@pytest.mark.parametrize("status", ["stopped", "interrupted"])
def test_a_stop_finishes_the_batches_in_hand_saves_and_ends(mode: str, status: Any) -> None:
    host = run(mode, run={"epochs": 9}, events=[(2.0, Stop(status))], evaluate=validate)
    assert host.finish == Finish(status)
    assert 0 < host.servers[0].version.updates == host.checkpoints[-1].updates
    assert host.now < 2.5
    validated = host.status.validation_epoch
    assert (validated is not None and validated % 1 != 0) == (status == "stopped")
    assert {cancel.worker for _, cancel in host.did(Cancel)} == {"worker-0", "worker-1"}


@pytest.mark.parametrize("mode", ["async", "bsp"])
def test_an_interrupted_run_waits_for_slow_batches_just_a_moment(mode: str) -> None:
    slow = {"worker-0": 0.05, "worker-1": 30.0}
    stops = [(2.0, Stop("interrupted"))]
    host = run(mode, run={"epochs": 9}, events=stops, compute_s=lambda worker, batch: slow[worker])
    assert host.finish == Finish("interrupted")
    assert host.now <= 2 + INTERRUPT_S + 0.1
    assert host.checkpoints[-1].updates == host.servers[0].version.updates
    assert [stopped.worker for _, stopped in host.did(StopWorker)][-1] == "worker-1"
    assert host.status.charged_failures == 0


def test_an_interruption_hastens_a_stop() -> None:
    stops = [(2.0, Stop("stopped")), (2.5, Stop("interrupted"))]
    host = run(run={"epochs": 9}, events=stops, compute_s=lambda worker, batch: 20.0)
    assert host.finish == Finish("interrupted")
    assert host.now <= 2.5 + INTERRUPT_S + 0.1


@pytest.mark.parametrize("at", [0.0, 0.0005, 0.5, 1.0, 1.0005])
@pytest.mark.parametrize("status", ["stopped", "interrupted"])
def test_a_run_can_be_stopped_while_it_starts(at: float, status: Any) -> None:
    assert run(events=[(at, Stop(status))], evaluate=validate).finish == Finish(status)


# Failures


@pytest.mark.parametrize("mode", ["async", "bsp"])
@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("workers", [1, 3])
def test_a_failure_costs_time_and_nothing_else(mode: str, kind: FaultKind, workers: int) -> None:
    host = run(mode, workers, faults=[Fault("worker-0", 7, kind)], failure={"timeout_s": 3.0})
    assert host.finish == Finish("finished")
    assert_exactly_once(host, 1)
    counts = host.status.ledger
    taken_over = kind == "silent" and mode == "async" and workers > 1
    charged = 0 if kind == "lane" or taken_over else 1  # what was taken over was not missed when the run ended
    assert (counts.batches, counts.applied, host.status.charged_failures) == (SIZE, SIZE, charged)
    assert (counts.requeued > 0) != taken_over
    hired = [start.worker for _, start in host.did(StartWorker)]
    assert (f"worker-{workers}" in hired) == (kind != "lane" and not taken_over)


def test_what_reached_the_server_is_not_leased_again() -> None:
    before, after = (run(workers=1, faults=[Fault("worker-0", 15, kind)]) for kind in ("before", "after"))
    assert before.status.ledger.requeued == after.status.ledger.requeued + 1
    assert after.status.ledger.duplicates == 0


def test_a_push_that_arrives_after_its_batch_was_leased_again_is_a_duplicate() -> None:
    host = run(faults=[Fault("worker-0", 3, "late")], compute_s=lambda worker, batch: 0.02)
    assert_exactly_once(host, 1)
    assert host.status.ledger.duplicates == 1


@settings(max_examples=60)
@given(
    st.sampled_from(["async", "bsp"]),
    st.integers(1, 4),
    st.integers(0, 2**32),
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 12), st.sampled_from(FAULTS)), max_size=8),
)
def test_nothing_is_lost_or_counted_twice_whatever_dies(
    mode: str, workers: int, seed: int, faults: list[tuple[int, int, FaultKind]]
) -> None:
    scripted = [Fault(f"worker-{number}", pushes, kind) for number, pushes, kind in faults]
    host = run(
        mode,
        workers,
        run={"epochs": 2},
        compute_s=speeds(seed),
        faults=scripted,
        failure={"timeout_s": 2.0, "max_failures": -1, "poison_tries": 100},  # several may die at one batch
        evaluate=validate,
        checkpoint={"every_s": None, "every_updates": 10},
    )
    assert host.finish == Finish("finished")
    assert_exactly_once(host, 2)


@settings(max_examples=20)
@given(st.integers(1, 3), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 12)), max_size=5))
def test_a_batch_that_one_partition_lacks_is_pushed_to_both_and_counted_once_in_each(
    workers: int, faults: list[tuple[int, int]]
) -> None:
    torn = [Fault(f"worker-{number}", pushes, "torn") for number, pushes in faults]
    limits = {"max_failures": -1, "poison_tries": 100}
    host = run(workers=workers, scaling={"servers": 2}, faults=torn, failure=limits)
    assert host.finish == Finish("finished")
    assert_exactly_once(host, 1)
    fired = host.status.charged_failures
    first, second = (host.servers[partition].report().pushes["duplicate"] for partition in range(2))
    assert first - second == fired  # what was taken over from a slow worker is a duplicate in both


@pytest.mark.parametrize(("allowed", "status"), [(1, "failed"), (2, "finished"), (-1, "finished"), (0, "failed")])
def test_more_failures_than_allowed_fail_the_run(allowed: int, status: str) -> None:
    faults = [Fault("worker-0", 2, "before"), Fault("worker-1", 5, "after")]
    host = run(faults=faults, failure={"max_failures": allowed})
    assert host.finish
    assert host.finish.status == status
    if status == "failed":
        assert f"failure.max_failures is {allowed}" in str(host.finish.error)


def test_a_preempted_worker_is_replaced_and_not_charged() -> None:
    taken: list[WorkerLost] = [WorkerLost("worker-0", "its node was taken away", preempted=True)]
    host = run(events=[(2.0, taken[0])], failure={"max_failures": 0})
    assert host.finish == Finish("finished")
    assert [start.worker for _, start in host.did(StartWorker)] == ["worker-0", "worker-1", "worker-2"]


@pytest.mark.parametrize("mode", ["async", "bsp"])
def test_a_silent_worker_is_given_up_after_the_time_limit(mode: str) -> None:
    grid = EpochGrid((200,), 200)
    host = run(mode, grid=grid, faults=[Fault("worker-0", 3, "silent")], failure={"timeout_s": 4.0})
    (at, stopped), *others = host.did(StopWorker)
    assert (stopped.worker, others) == ("worker-0", [])
    last_life = START_S + 3 * 0.05
    assert last_life + 4 <= at <= last_life + 4 + 0.3
    assert "failure.timeout_s" in stopped.cause
    assert host.status.charged_failures == 1


def test_who_waits_for_a_receipt_is_not_silent() -> None:
    slow = {"worker-0": 0.01, "worker-1": 3.0}
    host = run("bsp", grid=EpochGrid((12,), 12), compute_s=lambda w, b: slow[w], failure={"timeout_s": 3.5})
    assert host.finish == Finish("finished")
    assert host.did(StopWorker) == []


def test_a_worker_that_never_starts_is_replaced_after_the_time_limit() -> None:
    starts = {"worker-0": float("inf")}
    limits = {"timeout_s": 2.0, "start_timeout_s": 3.0}
    host = run(start_s=lambda worker: starts.get(worker, START_S), failure=limits, run={"max_time_s": 9.0})
    assert host.finish == Finish("finished")
    assert [(at, stopped.worker) for at, stopped in host.did(StopWorker)] == [(5.0, "worker-0")]


def test_if_nobody_ever_starts_the_run_fails() -> None:
    limits = {"start_timeout_s": 7.0, "timeout_s": 2.0, "max_failures": 3}
    host = run(start_s=lambda worker: float("inf"), failure=limits)
    assert host.finish
    assert host.finish.status == "failed"
    assert "not up after 9.0 s (see failure.start_timeout_s)" in str(host.finish.error)


def test_the_models_own_error_fails_the_run_at_once() -> None:
    def raising(batch: BatchId, weights: FloatArray, out: FloatArray) -> float:
        if batch == GRID.batch(0, 5):
            raise WorkerError("the model raised: no such layer")
        return quadratic(batch, weights, out)

    host = run(gradient=raising)
    assert host.finish
    assert host.finish.status == "failed"
    assert "no such layer" in str(host.finish.error)


@pytest.mark.parametrize("mode", ["async", "bsp"])
def test_a_diverged_run_fails_and_names_the_remedy(mode: str) -> None:
    def diverging(batch: BatchId, weights: FloatArray, out: FloatArray) -> float:
        out[:] = np.nan
        return float("nan")

    host = run(mode, gradient=diverging, failure={"max_rejected": 5})
    assert host.finish
    assert host.finish.status == "failed"
    assert "Lower optimizer.lr" in str(host.finish.error)
    np.testing.assert_array_equal(host.weights, START)


@pytest.mark.parametrize("mode", ["async", "bsp"])
def test_a_few_gradients_that_are_not_finite_are_computed_again(mode: str) -> None:
    seen: set[BatchId] = set()

    def hiccup(batch: BatchId, weights: FloatArray, out: FloatArray) -> float:
        loss = quadratic(batch, weights, out)
        if batch.index % 10 == 3 and batch not in seen:
            seen.add(batch)
            out[0] = np.inf
        return loss

    host = run(mode, gradient=hiccup)
    assert host.finish == Finish("finished")
    assert_exactly_once(host, 1)
    assert host.servers[0].report().pushes["rejected"] == len(seen) == 8


def test_whoever_pushes_often_is_given_up_sooner() -> None:
    """Patience is so many of the worker's own batches, once their time is known."""
    grid = EpochGrid((300,), 300)
    host = run(grid=grid, faults=[Fault("worker-0", 60, "silent")], failure={"timeout_s": 60.0})
    ((at, stopped),) = host.did(StopWorker)
    assert stopped.worker == "worker-0"
    silent_s = at - (START_S + 60 * 0.05)
    assert LEAST_SILENCE_TIMEOUT_S <= silent_s <= LEAST_SILENCE_TIMEOUT_S + 0.5


def test_nobody_is_given_up_before_the_servers_have_said_who_showed_life() -> None:
    host = run(grid=EpochGrid((400,), 400), timing=Timing(poll_s=8.0), lease_s=50.0, failure={"timeout_s": 5.0})
    assert host.finish == Finish("finished")
    assert host.did(StopWorker) == []


def test_a_hanging_workers_batches_are_taken_over_by_an_idle_one() -> None:
    host = run(faults=[Fault("worker-0", 20, "silent")], failure={"timeout_s": 30.0})
    assert {(note["worker"], note["by"]) for note in notes(host, "taken_over")} == {("worker-0", "worker-1")}
    assert_exactly_once(host, 1)
    assert host.did(Commit)[-1][0] < START_S + 10  # the limit of 30 s was not waited for


def test_a_slow_workers_last_batches_are_shared_and_it_is_called_off_at_the_end() -> None:
    grid = EpochGrid((60,), 60)
    slow = {"worker-0": 1.0, "worker-1": 0.05}
    host = run(grid=grid, run={"epochs": 2}, compute_s=lambda worker, batch: slow[worker])
    assert_exactly_once(host, 2, grid)
    assert notes(host, "taken_over")
    assert {cancel.worker for _, cancel in host.did(Cancel)} >= {"worker-0"}
    assert host.now < START_S + 12  # worker-0 alone would take 16 s for its first lease


# Lanes


def test_a_worker_gets_nothing_until_its_failed_lease_is_settled() -> None:
    host = run(workers=1, faults=[Fault("worker-0", 7, "lane")])
    failed_at = START_S + 8 * 0.05
    again = min(at for at, _ in host.did(Grant) if at > failed_at)
    assert any(failed_at < at < again and not ask.wait for at, ask in host.did(AskReport))
    assert_exactly_once(host, 1)
    assert (host.status.ledger.duplicates, host.status.charged_failures) == (0, 0)


@pytest.mark.parametrize(("failing", "replaced"), [((3, 4), False), ((3, 4, 5), True), ((3, 4, 30), False)])
def test_a_worker_that_cannot_reach_its_server_three_times_in_a_row_is_replaced(
    failing: tuple[int, ...], replaced: bool
) -> None:
    host = run(faults=[Fault("worker-0", push, "lane") for push in failing])
    assert_exactly_once(host, 1)
    assert host.status.failures == ({"lane_failed": 1} if replaced else {})
    assert [stopped.worker for _, stopped in host.did(StopWorker)] == ["worker-0"] * replaced


# Servers


def notes(host: InProcess, event: str) -> list[dict[str, Any]]:
    return [dict(note.fields) for _, note in host.did(Note) if note.event == event]


def run_killing(kills: Sequence[tuple[float, int]], mode: str = "async", workers: int = 2, **options: Any) -> InProcess:
    """A run some of whose servers are killed: when, and which."""
    sections = {name: options.pop(name) for name in (*SECTIONS, "consistency") if name in options}
    host = InProcess(job(mode, workers, **sections), options.pop("grid", GRID), START, quadratic, **options)
    for at, partition in kills:
        host.after(at, host.kill_server, partition)
    return host.run()


@pytest.mark.parametrize("mode", ["async", "bsp", "ssp"])
@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize("every", [None, 10])
def test_a_lost_server_is_restored_and_what_it_lacks_is_done_again(mode: str, servers: int, every: int | None) -> None:
    consistency = {"mode": mode} | ({"s": 1} if mode == "ssp" else {})
    checkpoint = {"every_s": None, "every_updates": every}
    scaling = {"servers": servers}
    host = run_killing([(2.0, servers - 1)], consistency=consistency, scaling=scaling, checkpoint=checkpoint)
    assert host.finish == Finish("finished")
    for partition, server in host.servers.items():
        report = server.report()
        assert (report.epochs, report.pushes["applied"]) == (1, SIZE)
        assert server.version.incarnation == 1 + (partition == servers - 1)
    (restored,) = notes(host, "server_restored")
    assert restored["partition"] == servers - 1
    assert restored["seconds"] >= Timing().restore_s
    assert restored["batches_lost"] > 0 or every
    assert host.status.failures == {"server_lost": 1}
    assert host.did(StopWorker) == []
    goodput = host.status.goodput
    assert goodput is not None
    assert 0 < goodput < 1 or (every and goodput == 1)


def test_the_partitions_that_live_refuse_what_the_restored_one_lacks() -> None:
    host = run_killing([(2.0, 1)], scaling={"servers": 2})
    alive, restored = (host.servers[partition].report().pushes for partition in range(2))
    assert alive["duplicate"] > 10
    assert restored["duplicate"] == 0


def test_a_server_that_dies_while_it_is_restored_is_restored_again() -> None:
    host = run_killing([(2.0, 0), (2.3, 0), (2.9, 0)])
    assert host.finish == Finish("finished")
    assert host.status.failures == {"server_lost": 3}
    assert host.servers[0].report().pushes["applied"] == SIZE
    assert host.servers[0].version.incarnation == 3  # the second one's first attempt came to nothing


def test_an_earlier_epoch_is_reopened_for_a_partition_that_does_not_contain_it() -> None:
    host = run_killing([(4.0, 1)], run={"epochs": 3}, scaling={"servers": 2}, evaluate=validate)
    assert host.finish == Finish("finished")
    assert notes(host, "epoch_reopened") == [{"epoch": 0}]
    for server in host.servers.values():
        assert server.report().pushes["applied"] == 3 * SIZE
    assert validations(host)[3] == validate(host.weights)


def test_a_server_lost_after_the_last_batch_takes_the_run_back_to_training() -> None:
    ends = run().did(Save)[-1][0]
    host = run_killing([(ends - 0.0005, 0)])
    assert host.finish == Finish("finished")
    assert host.servers[0].report().pushes["applied"] == SIZE
    assert host.checkpoints[-1].updates == SIZE


def test_nobody_is_given_up_while_a_server_is_restored() -> None:
    host = run_killing([(2.0, 0)], timing=Timing(restore_s=30.0), failure={"timeout_s": 2.0})
    assert host.finish == Finish("finished")
    assert host.did(StopWorker) == []


def test_waiting_for_a_server_wakes_nobody_though_a_checkpoint_is_due() -> None:
    host = run_killing([(2.0, 0)], timing=Timing(restore_s=30.0), checkpoint={"every_s": 0.5})
    assert host.finish == Finish("finished")
    assert len(host.actions) < 2000


def test_a_restored_server_is_told_the_settings_that_the_run_was_changed_to() -> None:
    settings = job("async", optimizer={"lr": 0.02}).settings
    host = run_killing([(2.0, 0)], events=[(1.5, Change(settings))])
    assert host.finish == Finish("finished")
    assert host.servers[0].settings == settings


def test_a_report_of_a_lost_server_does_not_bring_it_back() -> None:
    coordinator, (_, ask, *_) = start()
    assert isinstance(ask, AskReport)
    server = ParameterServer(job(), Partition(0, 0, 6, 6), START, GRID, Version(1, 0))
    coordinator.handle(Reported(server.report(), ask.asked), 0.5)
    coordinator.handle(ServerLost(0, "killed"), 1.0)
    coordinator.handle(Reported(server.report(), ask.asked), 1.1)
    assert coordinator.status(1.1).servers[0].phase == "restoring"


def test_a_server_that_cannot_be_started_fails_the_run() -> None:
    coordinator, _ = start()
    (finish,) = coordinator.handle(ServerLost(0, "no memory", died=False), 1.0)
    assert isinstance(finish, Finish)
    assert "could not be started: no memory" in str(finish.error)


def test_a_server_that_dies_before_its_first_report_is_started_again() -> None:
    coordinator, _ = start()
    actions = coordinator.handle(ServerLost(0, "killed"), 1.0)
    assert [type(action) for action in actions] == [StartServer, AskReport]
    ask = actions[1]
    assert isinstance(ask, AskReport)
    server = ParameterServer(job(), Partition(0, 0, 6, 6), START, GRID, Version(2, 0))
    coordinator.handle(Reported(server.report(), ask.asked), 2.0)
    status = coordinator.status(2.0)
    assert (status.servers[0].phase, status.charged_failures) == ("up", 1)


def test_more_lost_servers_than_allowed_fail_the_run_and_name_the_remedy() -> None:
    host = run_killing([(2.0, 0)], failure={"max_failures": 0})
    assert host.finish
    assert host.finish.status == "failed"
    assert "--resume" in str(host.finish.error)


def test_an_evaluation_whose_weights_are_lost_is_not_waited_for() -> None:
    host = run_killing([(4.70, 0)], run={"epochs": 3}, evaluate=validate, checkpoint={"every_s": 0.3})
    assert host.finish == Finish("finished")
    assert validations(host)[3] == validate(host.weights)


# Poison


POISON = GRID.batch(0, 9)


class Poisoned(InProcess):
    """Whoever computes one batch dies."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, compute_s=self._dies_of_it, **options)

    def _dies_of_it(self, worker: str, batch: BatchId) -> float:
        if batch == POISON:
            self.kill(worker)
            self.tell_soon(WorkerLost(worker, "killed by the kernel"), 0.05)
        return 0.05


def poisoned(failure: dict[str, Any], **scaling: int) -> Poisoned:
    return Poisoned(job("async", 2, failure=failure, scaling=scaling), GRID, START, quadratic)


def test_a_batch_that_kills_its_workers_fails_the_run_and_is_named() -> None:
    host = poisoned({"poison_tries": 3}).run()
    assert host.finish
    assert host.finish.status == "failed"
    assert str(POISON) in str(host.finish.error)
    assert "set failure.poison to skip" in str(host.finish.error)
    assert host.status.charged_failures == 3  # poison itself is no failure


@pytest.mark.parametrize("tries", [1, 3])
def test_or_it_is_done_without(tries: int) -> None:
    host = poisoned({"poison": "skip", "poison_tries": tries}).run()
    assert host.finish == Finish("finished")
    assert host.status.charged_failures == tries
    assert [note["batch"] for note in notes(host, "poison_skipped")] == [POISON]
    assert [skip.batch for _, skip in host.did(Skip)] == [POISON]
    assert host.servers[0].report().pushes["applied"] == SIZE - 1
    assert host.status.ledger.batches == SIZE


def test_a_suspect_is_leased_by_itself() -> None:
    host = poisoned({"poison": "skip", "poison_tries": 3}).run()
    with_it = [lease for lease in leased(host.did(Grant)) if (0, 9) in lease.positions()]
    assert [len(lease) == 1 for lease in with_it] == [False, True, True]


def test_a_gradient_that_is_never_finite_is_poison_too() -> None:
    def never_finite(batch: BatchId, weights: FloatArray, out: FloatArray) -> float:
        loss = quadratic(batch, weights, out)
        return float("nan") if batch == POISON else loss

    host = run(gradient=never_finite, failure={"poison": "skip"})
    assert host.finish == Finish("finished")
    assert host.servers[0].report().pushes["rejected"] == 3
    assert host.servers[0].report().pushes["applied"] == SIZE - 1


def test_a_restored_server_is_told_again_what_to_do_without() -> None:
    host = poisoned({"poison": "skip", "poison_tries": 1}, servers=2)
    host.after(3.0, host.kill_server, 1)
    host.run()
    assert host.finish == Finish("finished")
    assert {server.report().pushes["applied"] for server in host.servers.values()} == {SIZE - 1}
    assert len(host.did(Skip)) >= 2


# Scaling


@pytest.mark.parametrize("workers", [3, {"min": 3, "max": 4}])
@pytest.mark.parametrize("mode", ["async", "bsp"])
@pytest.mark.parametrize("at", [START_S / 2, START_S + 0.1])
def test_a_run_scaled_down_before_all_are_up_begins_with_those_left(mode: str, workers: Any, at: float) -> None:
    host = run(
        mode,
        scaling={"workers": workers},
        start_s=lambda worker: START_S if worker == "worker-0" else 2 * START_S,
        events=[(at, Scale(1))],
    )
    assert host.finish == Finish("finished")
    assert_exactly_once(host, 1)
    assert len(host.did(StartWorker)) == 3 + (workers != 3)


def test_scaled_down_the_run_goes_on_with_fewer_and_up_with_more() -> None:
    grid = EpochGrid((300,), 300)
    counts: list[tuple[float, int]] = []
    host = run(
        workers=4,
        grid=grid,
        events=[(2.0, Scale(1)), (5.0, Scale(3))],
        observers=[EachStep(lambda cluster: counts.append((cluster.now, len(cluster.workers))))],
        failure={"max_failures": 0},
    )
    assert host.finish == Finish("finished")
    assert_exactly_once(host, 1, grid)
    assert {number for at, number in counts if 2.2 < at < 5} == {1}
    assert {number for at, number in counts if at > 5.1} == {3}
    assert {stopped.worker for _, stopped in host.did(StopWorker)} == {"worker-1", "worker-2", "worker-3"}


@pytest.mark.parametrize("mode", ["async", "bsp"])
def test_a_draining_worker_finishes_its_batch(mode: str) -> None:
    host = run(mode, workers=3, events=[(2.01, Scale(1))], compute_s=speeds(3))
    assert_exactly_once(host, 1)
    assert host.status.ledger.duplicates == 0
    assert host.status.charged_failures == 0


def test_training_begins_with_the_least_that_there_must_be() -> None:
    late = {"worker-2": 3.0, "worker-3": float("inf")}
    host = run(
        scaling={"workers": {"min": 2, "max": 4}},
        start_s=lambda worker: late.get(worker, START_S),
        grid=EpochGrid((200,), 200),
        failure={"timeout_s": 2.0},
    )
    assert host.status.began == START_S
    assert host.did(StopWorker) == []  # there may be no room for the fourth, ever
    assert "worker-2" in {applied.worker for applied in host.applied}


# What it costs


def test_a_worker_that_recovers_is_noted_and_goodput_counts_what_was_wasted() -> None:
    host = run(workers=1, faults=[Fault("worker-0", 7, "before")])
    (note,) = notes(host, "worker_recovered")
    assert (note["worker"], note["batches_again"]) == ("worker-0", 9)
    assert host.status.goodput == SIZE / (SIZE + 1)
    assert run().status.goodput == 1


def test_failures_are_counted_by_kind() -> None:
    faults = [Fault("worker-0", 2, "before"), Fault("worker-1", 4, "silent")]
    preempted = WorkerLost("worker-2", "its node was taken away", preempted=True)
    host = run(faults=faults, events=[(3.0, preempted)], failure={"timeout_s": 2.0}, failing_saves={0},
               checkpoint={"every_s": None, "every_updates": 30})  # fmt: skip
    assert host.status.failures == Counter({"worker_lost": 1, "worker_silent": 1, "preempted": 1, "save_failed": 1})
    assert host.status.charged_failures == 2


# Checkpoints


@pytest.mark.parametrize("mode", ["async", "bsp"])
def test_checkpoints_are_made_every_so_many_updates_and_at_the_end(mode: str) -> None:
    host = run(mode, grid=EpochGrid((200,), 200), checkpoint={"every_s": None, "every_updates": 20})
    saved = [checkpoint.updates for checkpoint in host.checkpoints]
    assert saved[-1] == host.servers[0].version.updates
    assert [checkpoint.number for checkpoint in host.checkpoints] == list(range(len(saved)))
    assert len(saved) >= 4
    assert all(20 <= late - early <= 30 for early, late in pairwise(saved[:-1]))


def test_checkpoints_are_made_every_so_many_seconds_of_training() -> None:
    host = run(grid=EpochGrid((200,), 200), checkpoint={"every_s": 2.0})
    times = [at for at, _ in host.did(Commit)]
    assert np.allclose(np.diff([START_S, *times[:-1]]), 2, atol=0.01)
    assert len(times) == 3


def test_waiting_for_something_new_to_save_wakes_nobody() -> None:
    events: list[float] = []
    host = run(
        grid=EpochGrid((4,), 4),
        checkpoint={"every_s": 0.5},
        compute_s=lambda worker, batch: 10.0,
        observers=[EachStep(lambda cluster: events.append(cluster.now))],
    )
    assert host.finish == Finish("finished")
    assert len(events) < 20 * host.now


def test_a_failed_checkpoint_does_not_end_the_run() -> None:
    host = run(checkpoint={"every_s": None, "every_updates": 20}, failing_saves={0, 2})
    assert host.finish == Finish("finished")
    assert [checkpoint.number for checkpoint in host.checkpoints] == [1, 3]


@pytest.mark.parametrize("failures", [1, len(PAUSES_S), len(PAUSES_S) + 1])
def test_the_last_checkpoint_is_tried_again_after_longer_and_longer_pauses(failures: int) -> None:
    host = run(checkpoint={"every_s": None}, failing_saves=range(failures))
    assert host.finish
    times = [at for at, _ in host.did(Save)]
    assert len(times) == min(failures, len(PAUSES_S)) + 1
    assert np.allclose(np.diff(times), PAUSES_S[: len(times) - 1], atol=0.01)
    if failures <= len(PAUSES_S):
        assert host.finish == Finish("finished")
        assert host.checkpoints[0].updates == SIZE
    else:
        assert host.finish.status == "unsaved"
        assert "the disk is full" in str(host.finish.error)


def test_an_interrupted_run_tries_its_last_checkpoint_once_and_does_not_wait() -> None:
    host = run(checkpoint={"every_s": None}, failing_saves=range(9), events=[(2.0, Stop("interrupted"))])
    assert host.finish
    assert (host.finish.status, len(host.did(Save))) == ("unsaved", 1)


def test_an_interrupt_ends_the_pause_before_the_last_checkpoint_is_tried_again() -> None:
    ends = run(checkpoint={"every_s": None}).now
    host = run(checkpoint={"every_s": None}, failing_saves={0}, events=[(ends + 0.5, Stop("interrupted"))])
    assert host.finish == Finish("interrupted")
    first, second = (at for at, _ in host.did(Save))
    assert second - first < PAUSES_S[0]
    assert len(host.checkpoints) == 1


def test_a_server_lost_in_the_pause_is_restored_and_the_last_checkpoint_written() -> None:
    ends = run(checkpoint={"every_s": None}).now

    class Loses(ClusterObserver):
        def acted(self, cluster: VirtualCluster, action: Action) -> None:
            if isinstance(action, Save) and action.checkpoint == 0:
                cluster.after(0.5, cluster.kill_server, 0)

    spec = job(workers=2, checkpoint={"every_s": None})
    host = InProcess(spec, GRID, START, quadratic, failing_saves={0}, observers=[Loses()]).run()
    assert host.finish == Finish("finished")
    assert host.checkpoints[-1].updates == SIZE
    assert host.now > ends + 1


def test_a_full_disk_is_not_hammered() -> None:
    host = run(checkpoint={"every_s": None, "every_updates": 20}, failing_saves=range(1000))
    assert len(host.did(Save)) <= SIZE / 20 + 1 + len(PAUSES_S)


# Evaluations


def test_every_epoch_is_evaluated_once_on_the_weights_it_ended_with() -> None:
    host = run(workers=1, run={"epochs": 3}, evaluate=validate)
    serial = START.copy()
    expected = {}
    for epoch in range(3):
        for position in range(SIZE):
            gradient = np.empty_like(serial)
            quadratic(GRID.batch(epoch, position), serial, gradient)
            serial -= np.float32(0.1) * gradient
        expected[epoch + 1] = validate(serial)
    assert validations(host) == expected
    assert len(host.did(Evaluate)) == 3


def test_a_run_that_ends_inside_an_epoch_evaluates_the_weights_it_ends_with() -> None:
    host = run(run={"max_updates": SIZE + 5}, evaluate=validate)
    assert list(validations(host)) == [1]
    assert host.status.validation_epoch == 1 + 5 / SIZE
    assert host.status.validation == validate(host.weights)


def test_what_a_dead_worker_was_evaluating_goes_to_another() -> None:
    lost = WorkerLost("worker-0", "killed")
    ends = run(workers=1, evaluate=validate).did(Evaluate)[0][0]
    host = run(workers=1, evaluate=validate, events=[(ends + EVALUATE_S / 2, lost)])
    assert host.finish == Finish("finished")
    assert [evaluate.worker for _, evaluate in host.did(Evaluate)] == ["worker-0", "worker-1"]
    assert validations(host) == {1: validate(host.weights)}


def test_without_validation_data_nothing_is_evaluated() -> None:
    assert run().did(Evaluate) == []


# Resuming


def halves(mode: str, workers: int, at: int, **options: Any) -> tuple[InProcess, InProcess, InProcess]:
    """A run undisturbed; the same with checkpoints; and continued from the first one."""
    spec: dict[str, Any] = {"run": {"epochs": 2}, "optimizer": {"lr": 0.1, "momentum": 0.9}} | options
    whole = run(mode, workers, **spec)
    first = run(mode, workers, checkpoint={"every_s": None, "every_updates": at}, **spec)
    return whole, first, run(mode, workers, resume=first.checkpoints[0], **spec)


@settings(max_examples=20)
@given(st.integers(1, SIZE), st.integers(0, 2**32))
def test_one_worker_resumed_ends_bit_for_bit_as_undisturbed(at: int, seed: int) -> None:
    whole, first, second = halves("async", 1, at, compute_s=speeds(seed))
    assert first.checkpoints[0].updates < 2 * SIZE  # the second epoch is still under way
    assert second.applied[0].read.updates == first.checkpoints[0].updates
    np.testing.assert_array_equal(second.weights, whole.weights)
    np.testing.assert_array_equal(first.weights, whole.weights)


@settings(max_examples=20)
@given(st.integers(2, 4), st.integers(1, 30), st.integers(0, 2**32))
def test_bsp_of_constant_size_resumed_ends_bit_for_bit_as_undisturbed(workers: int, at: int, seed: int) -> None:
    whole, first, second = halves("bsp", workers, at, compute_s=speeds(seed))
    assert first.checkpoints[0].updates < whole.servers[0].version.updates
    np.testing.assert_array_equal(second.weights, whole.weights)


@settings(max_examples=20)
@given(st.sampled_from(["async", "bsp"]), st.integers(1, 100), st.integers(1, 4), st.sampled_from(FAULTS))
def test_a_resumed_run_applies_what_was_missing(mode: str, at: int, workers: int, kind: FaultKind) -> None:
    spec: dict[str, Any] = {"run": {"epochs": 2}, "compute_s": speeds(at), "failure": {"timeout_s": 2.0}}
    first = run(mode, 3, checkpoint={"every_s": None, "every_updates": at}, **spec)
    second = run(mode, workers, resume=first.checkpoints[0], faults=[Fault("worker-0", 3, kind)], **spec)
    assert second.finish == Finish("finished")
    state = first.checkpoints[0].states[0]
    saved = [applied.batch for applied in first.applied if applied.after.updates <= first.checkpoints[0].updates]
    everything = {GRID.batch(epoch, position) for epoch in range(2) for position in range(SIZE)}
    assert Counter(saved + [applied.batch for applied in second.applied]) == Counter(everything)
    assert state.metadata["samples"] == len(saved)
    counts = second.status.ledger
    assert counts.batches == counts.applied == 2 * SIZE


def test_resuming_a_finished_run_finishes_at_once() -> None:
    first = run(evaluate=validate)
    again = run(resume=first.checkpoints[-1], evaluate=validate)
    assert again.finish == Finish("finished")
    assert (again.applied, again.checkpoints) == ([], [])
    assert (again.status.validation_epoch, again.status.validation) == (1, validate(first.weights))


def test_rejections_before_a_resumption_are_past() -> None:
    seen: set[BatchId] = set()

    def hiccup(batch: BatchId, weights: FloatArray, out: FloatArray) -> float:
        loss = quadratic(batch, weights, out)
        if batch.index < 4 and batch not in seen:
            seen.add(batch)
            return float("nan")
        return loss

    first = run(run={"max_updates": 60}, gradient=hiccup, failure={"max_rejected": 20})
    assert first.servers[0].report().pushes["rejected"] > 2
    second = run(resume=first.checkpoints[-1], gradient=hiccup, failure={"max_rejected": 0})
    assert second.finish == Finish("finished")


# Actions as data


def start(mode: str = "async", workers: int = 2) -> tuple[Coordinator, Sequence[object]]:
    coordinator = Coordinator(job(mode, workers), GRID, validates=False)
    return coordinator, coordinator.handle(Started(), 0.0)


def test_a_run_starts_its_server_asks_it_and_starts_its_workers() -> None:
    _, actions = start()
    assert [type(action) for action in actions] == [StartServer, AskReport, StartWorker, StartWorker]


def test_finish_comes_alone_and_nothing_after_it() -> None:
    coordinator, _ = start()
    (finish,) = coordinator.handle(ServerLost(0, "no memory", died=False), 1.0)
    assert isinstance(finish, Finish)
    assert coordinator.handle(Tick(), 2.0) == ()
    assert coordinator.handle(Stop("stopped"), 2.0) == ()


def test_every_worker_joins_before_the_first_of_a_round_can_push() -> None:
    host = run("bsp", 3)
    kinds = [type(action).__name__ for _, action in host.actions]
    first_grant = kinds.index("Grant")
    assert kinds[:first_grant].count("Join") == 3


def leased(actions: Collection[tuple[float, Grant]]) -> list[Lease]:
    return [grant.lease for _, grant in actions]


def test_leases_shrink_towards_an_epochs_end() -> None:
    sizes = [len(lease) for lease in leased(run(workers=2, compute_s=lambda w, b: 0.02).did(Grant))]
    assert sizes[0] > sizes[-1] == 1


def test_a_worker_that_is_late_finds_its_share() -> None:
    """The first one up would have all of a short epoch on lease."""
    late = 0.3
    seconds = 0.005
    grid = EpochGrid((200,), 200)
    starts = {"worker-1": START_S + late}
    host = run(grid=grid, compute_s=lambda w, b: seconds, start_s=lambda worker: starts.get(worker, START_S))
    assert_exactly_once(host, 1, grid)
    assert min(at for at, grant in host.did(Grant) if grant.worker == "worker-1") == START_S + late
    last = host.servers[0].report().last
    assert last
    assert last.now <= START_S + late + (200 * seconds - late) / 2 + 0.1
    assert notes(host, "taken_over") == []  # too little is left for that


def test_a_worker_that_joins_shares_what_is_on_lease() -> None:
    """How fast it is nobody knows yet."""
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


def test_a_worker_given_up_is_not_listened_to_any_more() -> None:
    host = run(faults=[Fault("worker-0", 3, "silent")], failure={"timeout_s": 2.0}, run={"epochs": 3})
    assert host.finish == Finish("finished")
    coordinator, _ = start()
    assert coordinator.handle(WorkerLost("worker-9", "killed"), 1.0) == ()
    assert coordinator.status(1.0).charged_failures == 0


def test_a_worker_that_cannot_be_built_fails_the_run_at_once() -> None:
    coordinator, _ = start()
    (finish,) = coordinator.handle(WorkerLost("worker-1", "ImportError: no my_model", died=False), 1.0)
    assert isinstance(finish, Finish)
    assert finish.status == "failed"
    assert "worker-1 could not be built on its machine" in str(finish.error)
    assert "ImportError: no my_model. Install there" in str(finish.error)


def test_a_worker_that_cannot_be_built_where_all_could_before_counts_as_a_death() -> None:
    unbuilt = WorkerLost("worker-1", "ImportError: no my_model", died=False)
    host = run(events=[(3.0, unbuilt)], run={"epochs": 3})
    assert host.finish == Finish("finished")
    assert host.status.failures == Counter({"worker_lost": 1})


def test_a_report_of_nothing_new_is_answered_with_the_next_question() -> None:
    host = run()
    coordinator, (_, ask, *_) = start()
    assert isinstance(ask, AskReport)
    report = replace(host.servers[0].report(), epochs=0, pushes={"rejected": 0})
    actions = coordinator.handle(Reported(report, ask.asked), 1.0)
    assert [type(action) for action in actions] == [AskReport]
    assert EVALUATION_FACTOR > 1


def test_a_report_overtaken_on_its_way_takes_nothing_back() -> None:
    coordinator, (_, ask, *_) = start()
    assert isinstance(ask, AskReport)
    server = ParameterServer(job(), Partition(0, 0, 6, 6), START, GRID, Version(1, 0))
    coordinator.handle(Reported(server.report(), ask.asked), 0.5)
    server.push(push(GRID.batch(0, 0), server.version), now=1.0)
    older = server.report()
    for position in range(1, SIZE):
        server.push(push(GRID.batch(0, position), server.version), now=2.0)
    for report in (server.report(), older):
        coordinator.handle(Reported(report, ask.asked + 1), 3.0)
        status = coordinator.status(3.0)
        assert (status.epochs, status.updates, status.examples) == (1, SIZE, SIZE)
