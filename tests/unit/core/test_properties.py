"""Properties of every consistency mode over random schedules: workers differ, die, hang, come late and are refused."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from psgd.core.driver.events import Change, ChangeServer, Finish, Join, Leave
from psgd.core.server.journal import RecordKind
from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.partitions import Partition
from psgd.core.server.state import ServerState
from psgd.simulation.cluster import VirtualCluster
from psgd.simulation.observer import ClusterObserver
from psgd.spec import JobSpec
from psgd_workers.messages import BatchId, EpochGrid, FloatArray, Gradient, Outcome, Version
from tests.support.in_process import START_S, Fault, FaultKind, InProcess, VirtualCheckpoint
from tests.support.jobs import START, job, push, quadratic

GRID = EpochGrid((8, 7), 15)
EPOCHS = 2
BATCHES = [GRID.batch(epoch, position) for epoch in range(EPOCHS) for position in range(GRID.num_batches)]
NUMBER = {batch: number for number, batch in enumerate(BATCHES)}
HUGE = 10**9

FRESH = ("bsp", "k_sync", "backup", "rennala", "malenia")  # modes that admit no stale gradient
COLLECTING = ("buffered", "softsync", "rennala", "malenia", "ringleader")  # modes whose open rounds are in checkpoints
MODES = ("async", "ssp", "ringmaster", "buffered", "softsync", "local", "ringleader", *FRESH)
ON_SEVERAL = ("async", "ssp", "ringmaster", "buffered", "softsync", "local", "bsp")  # modes for several servers
AHEAD = ("async", "ringmaster", "buffered", "softsync", "local")  # modes for a pipeline

Mode = dict[str, Any]


def modes(name: str, workers: int) -> st.SearchStrategy[Mode]:
    """Draw a mode with any fields that this number of workers allows."""
    fields: dict[str, dict[str, st.SearchStrategy[Any]]] = {
        "k_sync": {"k": st.integers(1, workers)},
        "backup": {"b": st.integers(0, workers - 1)},
        "ssp": {"s": st.integers(0, 3)},
        "softsync": {"s": st.integers(1, workers)},
        "ringmaster": {"r": st.integers(1, 2 * workers), "stop": st.booleans()},
        "rennala": {"s": st.integers(1, 2 * workers)},
        "malenia": {"s": st.integers(1, 2 * workers)},
        "buffered": {"k": st.integers(1, 2 * workers)},
        "local": {"h": st.just(2), "lr": st.just(0.1), "synchronous": st.booleans()},
    }
    late = {"late": st.sampled_from(["requeue", "discard"])}
    refusing = name in ("k_sync", "backup", "ringmaster", "rennala", "malenia")
    return st.fixed_dictionaries({"mode": st.just(name)} | fields.get(name, {}) | (late if refusing else {}))


@dataclass(frozen=True)
class Schedule:
    """The speed and the faults of the workers of a run."""

    workers: int
    seed: int
    pace: str = "constant"
    starts: tuple[float, ...] = ()  # times to start the first workers, seconds; the others take START_S
    lease_s: float = 2.0
    faults: tuple[Fault, ...] = ()
    rejected: frozenset[int] = frozenset()  # batches whose first gradient is not finite

    def compute_s(self, worker: str, batch: BatchId) -> float:
        slot = int(worker.removeprefix("worker-"))
        if self.pace == "constant":  # simultaneous pushes arrive in the order in which the workers started
            return 0.05
        if self.pace == "one slow":
            return 0.5 if slot == 0 else 0.05
        return float(np.random.default_rng([self.seed, slot, *batch]).exponential(0.05))

    def start_s(self, worker: str) -> float:
        slot = int(worker.removeprefix("worker-"))
        return self.starts[slot] if slot < len(self.starts) else START_S


@st.composite
def calm(draw: st.DrawFn, most: int = 6) -> Schedule:
    """Draw a schedule whose workers are all present from the start to the end."""
    pace = draw(st.sampled_from(["constant", "one slow", "exponential"]))
    return Schedule(draw(st.integers(1, most)), draw(st.integers(0, 2**32)), pace)


@st.composite
def rough(draw: st.DrawFn, most: int = 6) -> Schedule:
    """Draw a schedule in which some workers come late, die or hang, and some gradients are not finite."""
    base = draw(calm(most))
    fault = st.builds(
        Fault,
        st.integers(0, base.workers).map("worker-{}".format),  # the last one replaces the first worker that dies
        st.integers(0, 6),
        st.sampled_from(get_args(FaultKind)),
    )
    faults = draw(st.lists(fault, max_size=3, unique_by=lambda fault: fault[:2]))
    starts = draw(st.lists(st.sampled_from([START_S, 1.2 * START_S]), max_size=base.workers))
    rejected = draw(st.frozensets(st.integers(0, len(BATCHES) - 1), max_size=2))
    lease_s = draw(st.sampled_from([0.05, 0.3, 2.0]))
    return Schedule(base.workers, base.seed, base.pace, tuple(starts), lease_s, tuple(faults), rejected)


def on_disk(checkpoint: VirtualCheckpoint) -> VirtualCheckpoint:
    """Return the checkpoint with its metadata as JSON gives it back."""
    states = tuple(ServerState(state.arrays, json.loads(json.dumps(state.metadata))) for state in checkpoint.states)
    return checkpoint._replace(states=states)


def saved(checkpoint: VirtualCheckpoint) -> Counter[BatchId]:
    """Return the batches that are settled in a checkpoint."""
    state = checkpoint.states[0]
    settled = {batch for batch in BATCHES if batch.epoch < state.metadata["epochs"]}
    for epoch, bitmap in state.part("settled").items():
        settled |= {GRID.batch(int(epoch), int(position)) for position in np.flatnonzero(bitmap)}
    return Counter(settled)


def buffered(checkpoint: VirtualCheckpoint) -> int:
    """Return the number of gradients in the open round of a checkpoint."""
    pushes: dict[str, int] = checkpoint.states[0].metadata["pushes"]
    return saved(checkpoint).total() - pushes.get("applied", 0) - pushes.get("discarded", 0)


class Calls(ClusterObserver):
    """An observer that keeps the first server's calls and all journals, and checks that server's counters at a push."""

    def __init__(self, mode: str, pushed: int) -> None:
        self.calls: list[tuple[str, Any, float]] = []
        self.modes = [mode]
        self.records: dict[int, list[NDArray[np.void]]] = defaultdict(list)
        self._pushed = pushed

    def pushed(self, cluster: VirtualCluster, partition: int, gradient: Gradient) -> None:
        if partition:
            return
        self.calls.append(("push", gradient, cluster.now))
        self._pushed += 1
        report = cluster.servers[0].report()
        assert sum(report.pushes.values()) == self._pushed
        assert sum(report.staleness.values()) == report.pushes["applied"] == report.samples
        open_ones = sum(int(bitmap.sum()) for bitmap in report.settled.values())
        settled = report.pushes["applied"] + report.pushes["buffered"] + report.pushes["discarded"]
        assert settled == report.epochs * GRID.num_batches + open_ones

    def acted(self, cluster: VirtualCluster, action: Any) -> None:
        match action:
            case Join(worker):
                self.calls.append(("join", worker, cluster.now))
            case Leave(worker):
                self.calls.append(("leave", worker, cluster.now))
            case ChangeServer(_, changed):
                self.calls.append(("change", changed, cluster.now))
                self.modes.append(changed.consistency.mode)

    def journalled(self, cluster: VirtualCluster, partition: int, records: NDArray[np.void]) -> None:
        self.records[partition].append(records)


class Recorded(InProcess):
    """A run that keeps its journals and its first server's calls, and checks that server's counters at every push."""

    def __init__(self, spec: JobSpec, *arguments: Any, **options: Any) -> None:
        resume = options.get("resume")
        pushed = sum(resume.states[0].metadata["pushes"].values()) + buffered(resume) if resume else 0
        kept = Calls(spec.consistency.mode, pushed)
        super().__init__(spec, *arguments, observers=[kept], **options)
        self.calls = kept.calls
        self.modes = kept.modes
        self._records = kept.records

    def records(self, partition: int = 0) -> NDArray[np.void]:
        """Return the whole journal of a server."""
        self._records[partition].append(self.servers[partition].journal.take())
        return np.concatenate(self._records[partition])

    def batches(self, *outcomes: Outcome, partition: int = 0) -> Counter[BatchId]:
        """Return batch -> number of its pushes with one of these outcomes."""
        records = self.records(partition)
        codes = [list(Outcome).index(outcome) for outcome in outcomes]
        chosen = records[(records["kind"] == RecordKind.PUSH) & np.isin(records["outcome"], codes)]
        return Counter(BatchId(*batch) for batch in chosen[["epoch", "shard", "index"]].tolist())


def one_hot(batch: BatchId, weights: FloatArray, out: FloatArray) -> float:
    """Write the gradient of a batch: 1 at a weight of its own. At rate 1, a step on a mean moves all weights by 1."""
    out[:] = 0
    out[NUMBER[batch]] = 1
    return 1.0


def run(
    mode: Mode,
    schedule: Schedule,
    gradient: Callable[[BatchId, FloatArray, FloatArray], float] = one_hot,
    host: type[Recorded] = Recorded,
    spec: dict[str, Any] | None = None,
    **options: Any,
) -> Recorded:
    """Run a schedule to its end."""
    refused = set(schedule.rejected)

    def compute(batch: BatchId, weights: FloatArray, out: FloatArray) -> float:
        loss = gradient(batch, weights, out)
        if NUMBER[batch] in refused:
            refused.remove(NUMBER[batch])
            return float("nan")
        return loss

    return host(
        make(mode, schedule.workers, 1.0 if gradient is one_hot else 0.1, **(spec or {})),
        GRID,
        np.zeros(len(BATCHES), np.float32) if gradient is one_hot else START,
        compute,
        compute_s=schedule.compute_s,
        start_s=schedule.start_s,
        lease_s=schedule.lease_s,
        faults=schedule.faults,
        **options,
    ).run()


def make(mode: Mode, workers: int, lr: float, **sections: Any) -> JobSpec:
    plain: dict[str, Any] = {
        "run": {"epochs": EPOCHS},
        "failure": {"timeout_s": 2.0, "poison_tries": 99},
        "optimizer": {"lr": lr},
    }
    return job(workers=workers, consistency=mode, **(plain | sections))


def assert_exactly_once(host: Recorded, before: Counter[BatchId] | None = None) -> None:
    """Check that every batch is in the weights or was discarded, once, and that the counters agree with that."""
    report = host.servers[0].report()
    counts = host.status.ledger
    taken = host.batches(Outcome.APPLIED, Outcome.BUFFERED)
    discarded = host.batches(Outcome.DISCARDED)
    assert host.finish == Finish("finished")
    assert taken + discarded + (before or Counter()) == Counter(BATCHES)
    assert (report.epochs, report.pushes["buffered"], host.servers[0].epochs) == (EPOCHS, 0, EPOCHS)
    assert counts.batches == counts.applied + counts.discarded == len(BATCHES)
    moved = {BATCHES[number] for number in np.flatnonzero(host.weights < 0)}
    assert len(moved) == counts.applied
    assert not moved & set(discarded)
    steps = pytest.approx(report.version.updates, rel=1e-4)
    assert -host.weights.sum() == steps or ("buffered" in host.modes and -host.weights.sum() < report.version.updates)


def assert_staleness(host: Recorded, mode: Mode) -> None:
    most = max(host.servers[0].report().staleness, default=0)
    if mode["mode"] in FRESH or mode.get("synchronous"):
        assert most == 0
    if mode["mode"] == "ringmaster":
        assert most <= mode["r"] - 1


# Exactly once


@pytest.mark.parametrize("name", MODES)
@settings(max_examples=12)
@given(data=st.data())
def test_every_batch_counts_once_whatever_befalls_the_workers(name: str, data: st.DataObject) -> None:
    schedule = data.draw(rough())
    mode = data.draw(modes(name, schedule.workers))
    host = run(mode, schedule)
    assert_exactly_once(host)
    assert_staleness(host, mode)


@pytest.mark.parametrize("kind", get_args(FaultKind))
@pytest.mark.parametrize("name", MODES)
def test_every_mode_survives_a_fault_in_the_middle_of_a_round(name: str, kind: FaultKind) -> None:
    faults = [Fault("worker-1", push, kind) for push in (1, 3)] + [Fault("worker-3", 0, kind)]
    for mode in SAMPLES[name]:
        assert_exactly_once(run(mode, Schedule(3, 7, "exponential", lease_s=0.3, faults=tuple(faults))))


def assert_exactly_once_everywhere(host: Recorded) -> None:
    """Check the same for every partition by itself, as partitions may discard different batches."""
    assert host.finish == Finish("finished")
    assert host.status.ledger.batches == len(BATCHES)
    for partition, server in host.servers.items():
        report = server.report()
        taken, discarded = (
            host.batches(*outcomes, partition=partition)
            for outcomes in ((Outcome.APPLIED, Outcome.BUFFERED), (Outcome.DISCARDED,))
        )
        assert taken + discarded == Counter(BATCHES)
        assert (report.epochs, report.pushes["buffered"], report.samples) == (EPOCHS, 0, taken.total())
        numbers = range(host.parts[partition].start, host.parts[partition].stop)
        moved = {BATCHES[number] for number in numbers if host.weights[number] < 0}
        assert moved == {BATCHES[number] for number in numbers} - set(discarded)


@pytest.mark.parametrize("name", sorted({*ON_SEVERAL, *AHEAD}))
@settings(max_examples=15)
@given(data=st.data())
def test_every_batch_counts_once_on_every_server_and_computed_ahead(name: str, data: st.DataObject) -> None:
    schedule = data.draw(rough())
    mode = data.draw(modes(name, schedule.workers))
    ahead = name in AHEAD and not mode.get("synchronous")
    scaling = {"servers": data.draw(st.integers(1, 3)), "pipeline": data.draw(st.integers(0, 2)) if ahead else 0}
    host = run(mode, schedule, spec={"scaling": scaling})
    assert_exactly_once_everywhere(host)
    assert_staleness(host, mode)


@pytest.mark.parametrize("name", MODES)
@settings(max_examples=8)
@given(data=st.data(), updates=st.integers(1, 20))
def test_every_mode_comes_to_a_limit_of_steps(name: str, data: st.DataObject, updates: int) -> None:
    """Check that a run reaches its limit, although the leases near it have only the batches that the steps need."""
    schedule = data.draw(rough())
    host = run(data.draw(modes(name, schedule.workers)), schedule, spec={"run": {"max_updates": updates, "epochs": 2}})
    report = host.servers[0].report()
    assert host.finish == Finish("finished")
    assert report.version.updates >= updates or report.epochs == EPOCHS
    assert set(host.batches(Outcome.APPLIED, Outcome.BUFFERED, Outcome.DISCARDED).values()) <= {1}


SAMPLES: dict[str, list[Mode]] = {
    "async": [{"mode": "async"}],
    "ssp": [{"mode": "ssp", "s": s} for s in (0, 2)],
    "ringmaster": [{"mode": "ringmaster", "r": 2, "late": "discard"}, {"mode": "ringmaster", "r": 1, "stop": True}],
    "buffered": [{"mode": "buffered", "k": 4}],
    "softsync": [{"mode": "softsync", "s": 1}],
    "local": [{"mode": "local", "h": 2, "lr": 0.1, "synchronous": synchronous} for synchronous in (True, False)],
    "ringleader": [{"mode": "ringleader"}],
    "bsp": [{"mode": "bsp"}],
    "k_sync": [{"mode": "k_sync", "k": k} for k in (2, 3)],
    "backup": [{"mode": "backup", "b": 1, "late": "discard"}],
    "rennala": [{"mode": "rennala", "s": 4}],
    "malenia": [{"mode": "malenia", "s": 5}],
}


# Equivalences, bit for bit


@pytest.mark.parametrize(
    "mode",
    [
        {"mode": "async"},
        {"mode": "bsp"},
        {"mode": "k_sync", "k": 1},
        {"mode": "backup", "b": 0},
        {"mode": "ssp", "s": 0},
        {"mode": "softsync", "s": 1},
        {"mode": "ringmaster", "r": 1},
        {"mode": "rennala", "s": 1},
        {"mode": "malenia", "s": 1},
        {"mode": "ringleader"},
        {"mode": "buffered", "k": 1},
        {"mode": "local", "h": 1, "lr": 1},
    ],
    ids=lambda mode: mode["mode"],
)
def test_one_worker_is_serial_gradient_descent_in_every_mode(mode: Mode) -> None:
    serial = START.copy()
    gradient = np.empty_like(START)
    for batch in BATCHES:
        quadratic(batch, serial, gradient)
        serial -= np.float32(0.1) * gradient
    np.testing.assert_array_equal(run(mode, Schedule(1, 0), quadratic).weights, serial)


@pytest.mark.parametrize(
    "mode",
    [{"mode": "ringmaster", "r": HUGE}, {"mode": "ringmaster", "r": HUGE, "stop": True}, {"mode": "ssp", "s": HUGE}],
)
@settings(max_examples=12)
@given(schedule=rough())
def test_without_a_bound_on_staleness_it_is_async(mode: Mode, schedule: Schedule) -> None:
    bounded, asynchronous = (run(mode, schedule, quadratic) for mode in (mode, {"mode": "async"}))
    assert bounded.applied == asynchronous.applied
    np.testing.assert_array_equal(bounded.weights, asynchronous.weights)


@settings(max_examples=12)
@given(rough())
def test_softsync_of_all_workers_is_async(schedule: Schedule) -> None:
    softsync = run({"mode": "softsync", "s": schedule.workers}, schedule, quadratic)
    np.testing.assert_array_equal(softsync.weights, run({"mode": "async"}, schedule, quadratic).weights)


@settings(max_examples=15)
@given(calm())
def test_k_sync_of_all_workers_is_bsp(schedule: Schedule) -> None:
    n = schedule.workers
    bsp, *same = (
        run(mode, schedule, quadratic)
        for mode in ({"mode": "bsp"}, {"mode": "k_sync", "k": n}, {"mode": "backup", "b": 0})
    )
    for host in same:
        assert host.applied == bsp.applied
        np.testing.assert_array_equal(host.weights, bsp.weights)


@settings(max_examples=15)
@given(calm())
def test_steps_on_one_gradient_without_staleness_are_the_same_in_three_modes(schedule: Schedule) -> None:
    ringmaster, *same = (
        run(mode, schedule, quadratic)
        for mode in ({"mode": "ringmaster", "r": 1}, {"mode": "rennala", "s": 1}, {"mode": "k_sync", "k": 1})
    )
    if schedule.workers > 1:  # k_sync of one worker is in lock-step, and its leases are other ones
        for host in same:
            assert host.applied == ringmaster.applied
            np.testing.assert_array_equal(host.weights, ringmaster.weights)


@pytest.mark.parametrize("name", MODES)
@settings(max_examples=6)
@given(data=st.data())
def test_the_same_order_of_pushes_gives_the_same_bits(name: str, data: st.DataObject) -> None:
    schedule = data.draw(rough())
    mode = data.draw(modes(name, schedule.workers))
    host = run(mode, schedule, quadratic)
    partition = Partition(0, 0, len(START), len(START))
    again = ParameterServer(make(mode, schedule.workers, 0.1), partition, START, GRID, Version(1, 0))
    for call, argument, now in host.calls:
        getattr(again, call)(argument, now)
    np.testing.assert_array_equal(again.published, host.weights)
    assert again.journal.take().tobytes() == host.records().tobytes()


# Staleness


@settings(max_examples=40)
@given(calm())
def test_ringleaders_delays_are_at_most_two_rounds(schedule: Schedule) -> None:
    host = run({"mode": "ringleader"}, schedule)
    assert max(host.servers[0].report().staleness) <= max(0, 2 * schedule.workers - 2)


class Starts(Recorded):
    """A run that keeps, for each batch started, the number of batches that its worker is ahead of the slowest one."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._pace_s = options.pop("compute_s")
        super().__init__(*arguments, compute_s=self._started, **options)
        self.ahead: list[int] = []

    def _started(self, worker: str, batch: BatchId) -> float:
        clocks = self.servers[0].clocks
        if worker in clocks:
            self.ahead.append(clocks[worker] - min(clocks.values()))
        return float(self._pace_s(worker, batch))


@settings(max_examples=30)
@given(rough(), st.integers(0, 4))
def test_in_ssp_nobody_starts_more_than_s_batches_ahead(schedule: Schedule, s: int) -> None:
    # A worker that loses its lane while its receipt is held back does not wait for it; see `Leasing.hold`.
    faults = tuple(fault for fault in schedule.faults if fault.kind != "lane")
    host = run({"mode": "ssp", "s": s}, replace(schedule, faults=faults), host=Starts)
    assert isinstance(host, Starts)
    assert max(host.ahead) <= s
    assert_exactly_once(host)


def test_in_ssp_a_worker_that_leaves_does_not_block_the_rest() -> None:
    mode = {"mode": "ssp", "s": 1}
    slow = Schedule(3, 0, "one slow", faults=(Fault("worker-0", 0, "before"),))
    host = run(mode, slow)
    assert_exactly_once(host)
    assert host.now < START_S + 0.5 + START_S  # the slow one died at its first push; no worker waited for its successor


def serve(mode: Mode, *live: str) -> ParameterServer:
    """Build a server that these workers have joined."""
    server = ParameterServer(make(mode, 3, 0.1), Partition(0, 0, len(START), len(START)), START, GRID, Version(1, 0))
    for worker in live:
        server.join(worker, 0.0)
    return server


@pytest.mark.parametrize("mode", [{"mode": "ssp", "s": 0}, {"mode": "bsp"}], ids=lambda mode: str(mode["mode"]))
def test_a_refused_push_begins_an_epoch_too(mode: Mode) -> None:
    """Check that the worker of a refused push waits like the others, because its batch is outstanding."""
    server = serve(mode, "a", "b")
    assert server.push(push(BATCHES[0], server.version, worker="a", loss=float("nan")), now=1.0) == ()
    receipts = server.push(push(BATCHES[1], server.version, worker="b"), now=2.0)
    assert {(receipt.worker, receipt.outcome) for receipt in receipts} == {
        ("a", Outcome.REJECTED),
        ("b", Outcome.APPLIED),
    }


def test_in_ssp_nobody_is_ahead_at_an_epochs_start() -> None:
    server = serve({"mode": "ssp", "s": 0}, "a")
    for batch in BATCHES[: GRID.num_batches - 1]:
        server.push(push(batch, server.version, worker="a"), now=1.0)
    server.join("b", now=1.0)
    server.push(push(BATCHES[GRID.num_batches - 1], server.version, worker="a"), now=1.0)
    assert len(set(server.clocks.values())) == 1


def test_in_malenia_who_has_left_holds_no_round_up() -> None:
    server = serve({"mode": "malenia", "s": 8}, "a", "b")
    server.push(push(BATCHES[0], server.version, worker="a"), now=1.0)
    server.leave("a", now=1.0)  # with its one gradient, the mean of 1 / B could never get below 2 / 8
    for batch in BATCHES[1:9]:
        assert server.version.updates == 0
        server.push(push(batch, server.version, worker="b"), now=2.0)
    assert server.report().pushes["applied"] == 9


# Change in the middle of a run


CHANGEABLE = [mode for name in MODES if name != "local" for mode in SAMPLES[name][:1]]


@pytest.mark.parametrize(("before", "after"), list(product(CHANGEABLE, CHANGEABLE)), ids=lambda mode: str(mode["mode"]))
def test_a_mode_can_be_changed_for_any_other(before: Mode, after: Mode) -> None:
    to = make(after, 3, 1.0).settings
    host = run(before, Schedule(3, 1, "exponential", lease_s=0.3), events=[(START_S + 0.2, Change(to))])
    assert_exactly_once(host)
    assert [settings for name, settings, _ in host.calls if name == "change"] == [to]


@settings(max_examples=25)
@given(st.data())
def test_modes_can_be_changed_whatever_befalls_the_workers(data: st.DataObject) -> None:
    schedule = data.draw(rough())
    first, *others = (
        data.draw(modes(name, schedule.workers))
        for name in data.draw(
            st.lists(st.sampled_from(MODES).filter(lambda name: name != "local"), min_size=2, max_size=4)
        )
    )
    changes = [
        (START_S + data.draw(st.floats(0, 1)), Change(make(mode, schedule.workers, 1.0).settings)) for mode in others
    ]
    assert_exactly_once(run(first, schedule, events=changes))


# Kill and resume


@pytest.mark.parametrize("name", MODES)
@settings(max_examples=6)
@given(data=st.data(), at=st.integers(1, 8))
def test_a_killed_run_goes_on_from_a_checkpoint(name: str, data: st.DataObject, at: int) -> None:
    schedule = data.draw(rough())
    again = data.draw(rough())
    mode = data.draw(modes(name, min(schedule.workers, again.workers)))
    first = run(mode, schedule, spec={"checkpoint": {"every_s": None, "every_updates": at}})
    for checkpoint in first.checkpoints[:2]:
        second = run(mode, again, resume=on_disk(checkpoint))
        assert_exactly_once(second, saved(checkpoint))


@pytest.mark.parametrize("name", COLLECTING)
def test_a_checkpoint_holds_the_open_round(name: str) -> None:
    schedule = Schedule(3, 7, "exponential")
    (mode, *_) = SAMPLES[name]
    first = run(mode, schedule, spec={"checkpoint": {"every_s": None, "every_updates": 1}})
    opened = [checkpoint for checkpoint in first.checkpoints if buffered(checkpoint)]
    assert opened
    for checkpoint in opened:
        assert checkpoint.states[0].part("aggregator")
        assert_exactly_once(run(mode, schedule, resume=on_disk(checkpoint)), saved(checkpoint))


@pytest.mark.parametrize(
    "mode", [mode for samples in SAMPLES.values() for mode in samples if mode["mode"] != "k_sync"], ids=str
)
def test_one_worker_resumed_ends_bit_for_bit_as_undisturbed(mode: Mode) -> None:
    mode = mode | ({"b": 0} if mode["mode"] == "backup" else {})
    alone = Schedule(1, 0)
    first = run(mode, alone, quadratic, spec={"checkpoint": {"every_s": None, "every_updates": 1}})
    assert len(first.checkpoints) > 3
    for checkpoint in first.checkpoints[::3]:
        second = run(mode, alone, quadratic, resume=on_disk(checkpoint))
        np.testing.assert_array_equal(second.weights, first.weights)
