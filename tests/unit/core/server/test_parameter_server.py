from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import permutations
from math import inf, nan
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from psgd.core.server.journal import RecordKind
from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.partitions import Partition
from psgd.errors import WeightsNotKeptError
from psgd.spec import JobSpec
from psgd_workers.messages import BatchId, Encoded, FloatArray, Outcome, Receipt, Version
from tests.support.jobs import GRID, START, job, push, quadratic

V0 = Version(1, 0)
FIRST = BatchId(0, 0, 0)
SECOND = BatchId(0, 0, 1)
WHOLE = Partition(0, 0, len(START), len(START))
MOMENTUM = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


def server(mode: str = "async", partition: Partition = WHOLE, **sections: Any) -> ParameterServer:
    return ParameterServer(job(mode, **sections), partition, START, GRID, V0)


def bsp(*live: str, **sections: Any) -> ParameterServer:
    """Build a server in lock-step with these workers."""
    lockstep = server("bsp", **sections)
    for worker in live:
        lockstep.join(worker, now=0.0)
    return lockstep


def randoms(*seed: int) -> FloatArray:
    return np.random.default_rng(seed).standard_normal(len(START), dtype=np.float32)


def outcomes(receipts: Sequence[Receipt]) -> list[Outcome]:
    return [receipt.outcome for receipt in receipts]


def batch_at(position: int) -> BatchId:
    return GRID.batch(position // GRID.num_batches, position % GRID.num_batches)


def fill(target: ParameterServer, batches: Sequence[BatchId]) -> None:
    """Push these batches one by one, each computed from the newest version."""
    for batch in batches:
        gradient = np.empty_like(START)
        loss = quadratic(batch, target.published, gradient)
        target.push(push(batch, target.version, values=gradient, loss=loss), now=1.0)


# Reading methods change nothing

MODES: dict[str, dict[str, Any]] = {
    "async": {},
    "bsp": {},
    "k_sync": {"k": 2},
    "backup": {"b": 1},
    "ssp": {"s": 1},
    "softsync": {"s": 2},
    "ringmaster": {"r": 2},
    "rennala": {"s": 2},
    "malenia": {"s": 2},
    "ringleader": {},
    "buffered": {"k": 2},
    "local": {"h": 2, "lr": 0.1},
}


def ask(target: ParameterServer) -> None:
    """Call every method that only reads, twice."""
    for _ in range(2):
        target.report()
        target.epoch_weights(None)
        target._mode.closes(target._round)
        target._mode.waiting(target._round)("a")
        if target.can_save:
            target.state()


def drive(target: ParameterServer, asked: bool) -> list[tuple[Receipt, ...]]:
    """Push by three workers, one of which leaves and returns, and one of which sends a gradient that is not finite."""
    for worker in "abc":
        target.join(worker, now=0.0)
    answers = []
    for number, worker in enumerate("abcbaacbcbbaacabcc"):
        if asked:
            ask(target)
        if number == 7:
            answers.append(target.leave("a", now=number))
        if number == 9:
            answers.append(target.join("a", now=number))
        norm = float("nan") if number == 5 else None
        batch = batch_at(number)
        answers.append(
            target.push(push(batch, target.version, worker=worker, values=randoms(number), norm=norm), number)
        )
    return answers


@pytest.mark.parametrize("mode", MODES)
def test_questions_change_nothing(mode: str) -> None:
    targets = [server(mode, consistency={"mode": mode} | MODES[mode], scaling={"workers": 3}) for _ in range(2)]
    answers = [drive(target, asked) for target, asked in zip(targets, (False, True), strict=True)]
    assert answers[0] == answers[1]
    assert targets[0].report().pushes == targets[1].report().pushes
    np.testing.assert_array_equal(targets[0].weights, targets[1].weights)
    np.testing.assert_array_equal(targets[0].journal.take(), targets[1].journal.take())


# Async


def test_async_steps_on_every_push() -> None:
    target = server()
    expected = START.copy()
    for number in range(4):
        gradient = randoms(number)
        receipts = target.push(push(batch_at(number), target.version, values=gradient), now=1.0)
        expected -= np.float32(0.1) * gradient
        assert receipts == (Receipt("worker-0", batch_at(number), Outcome.APPLIED, Version(1, number + 1)),)
        np.testing.assert_array_equal(target.published, expected)


def test_the_initial_weights_and_the_pushed_values_are_not_touched() -> None:
    initial = START.copy()
    values = randoms(0)
    target = ParameterServer(job(optimizer=MOMENTUM), WHOLE, initial, GRID, V0)
    for number in range(3):
        target.push(push(batch_at(number), V0, values=values), now=1.0)
    np.testing.assert_array_equal(initial, START)
    np.testing.assert_array_equal(values, randoms(0))


def test_staleness_is_counted_by_the_server() -> None:
    target = server()
    for number, read in enumerate([0, 0, 1, 0]):
        target.push(push(batch_at(number), Version(1, read)), now=1.0)
    assert target.report().staleness == {0: 1, 1: 2, 3: 1}


# Admission


def test_a_batch_pushed_again_is_refused_as_a_duplicate() -> None:
    target = server()
    target.push(push(FIRST, V0), now=1.0)
    before = target.published.copy()
    receipts = target.push(push(FIRST, target.version, worker="worker-1"), now=2.0)
    assert receipts == (Receipt("worker-1", FIRST, Outcome.DUPLICATE, Version(1, 1)),)
    np.testing.assert_array_equal(target.published, before)


@pytest.mark.parametrize("value", [nan, inf, -inf])
def test_values_that_are_not_finite_are_rejected_whatever_the_norm_says(value: float) -> None:
    target = server()
    values = np.ones_like(START)
    values[-1] = value
    assert outcomes(target.push(push(FIRST, V0, values=values, norm=1.0), now=1.0)) == [Outcome.REJECTED]
    np.testing.assert_array_equal(target.published, START)
    assert outcomes(target.push(push(FIRST, V0), now=2.0)) == [Outcome.APPLIED]


def test_finite_values_whose_squares_overflow_are_applied() -> None:
    target = server()
    values = np.full_like(START, 1e30)
    assert outcomes(target.push(push(FIRST, V0, values=values, norm=1e31), now=1.0)) == [Outcome.APPLIED]


@pytest.mark.parametrize(
    ("compression", "arrays"),
    [
        ({"name": "fp16"}, (np.array([1, inf, 0, 0, 0, 0], np.float16),)),
        ({"name": "top_k", "ratio": 0.5}, (np.array([0], np.uint32), np.array([nan], np.float32))),
    ],
)
def test_compressed_values_that_are_not_finite_are_rejected(
    compression: dict[str, Any], arrays: tuple[NDArray[Any], ...]
) -> None:
    target = server(compression=compression)
    gradient = push(FIRST, V0)._replace(values=Encoded(compression["name"], len(START), arrays), norm=1.0)
    assert outcomes(target.push(gradient, now=1.0)) == [Outcome.REJECTED]
    np.testing.assert_array_equal(target.published, START)


def test_weights_read_that_are_not_finite_are_rejected() -> None:
    target = server(correction={"name": "dc_asgd"})
    gradient = push(FIRST, V0)._replace(weights_read=np.full_like(START, nan))
    assert outcomes(target.push(gradient, now=1.0)) == [Outcome.REJECTED]
    np.testing.assert_array_equal(target.published, START)


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (1.0, float("nan")), (1.0, float("inf"))])
def test_what_is_not_finite_is_rejected_and_may_come_again(loss: float, norm: float) -> None:
    target = server()
    assert outcomes(target.push(push(FIRST, V0, loss=loss, norm=norm), now=1.0)) == [Outcome.REJECTED]
    assert target.version == V0
    np.testing.assert_array_equal(target.published, START)
    assert outcomes(target.push(push(FIRST, V0), now=1.0)) == [Outcome.APPLIED]


@pytest.mark.parametrize(
    ("read", "outcome"),
    [
        (Version(1, 0), Outcome.APPLIED),
        (Version(1, 3), Outcome.APPLIED),
        (Version(1, 4), Outcome.REQUEUED),  # a version of the old server after the fork
        (Version(2, 2), Outcome.REQUEUED),  # a version before the new server began
        (Version(2, 3), Outcome.APPLIED),
        (Version(2, 4), Outcome.APPLIED),
        (Version(2, 5), Outcome.REQUEUED),  # a version that does not exist yet
        (Version(0, 0), Outcome.REQUEUED),
        (Version(3, 4), Outcome.REQUEUED),
    ],
)
def test_only_versions_in_the_history_are_admitted(read: Version, outcome: Outcome) -> None:
    old = server()
    fill(old, [batch_at(number) for number in range(3)])
    new = ParameterServer.restore(job(), GRID, old.state(), incarnation=2, now=5.0)
    fill(new, [batch_at(3)])
    assert new.version == Version(2, 4)
    assert outcomes(new.push(push(batch_at(4), read), now=6.0)) == [outcome]


def test_a_second_fork_keeps_the_first_ones_history() -> None:
    state = server().state()
    for incarnation in (2, 3):
        target = ParameterServer.restore(job(), GRID, state, incarnation, now=5.0)
        fill(target, [batch_at(incarnation)])
        state = target.state()
    admitted = []
    for read in [Version(incarnation, updates) for incarnation in range(1, 6) for updates in range(4)]:
        last = ParameterServer.restore(job(), GRID, state, incarnation=4, now=5.0)
        if outcomes(last.push(push(FIRST, read), now=6.0)) == [Outcome.APPLIED]:
            admitted.append(tuple(read))
    assert admitted == [(1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (4, 2)]


# Rounds


def test_a_round_closes_when_every_live_worker_was_heard() -> None:
    target = bsp("a", "b", "c")
    assert target.push(push(FIRST, V0, worker="b"), now=1.0) == ()
    assert target.push(push(SECOND, V0, worker="a"), now=1.0) == ()
    assert target.version == V0
    assert target.report().parked == {"a", "b"}
    assert not target.can_save
    receipts = target.push(push(batch_at(2), V0, worker="c"), now=1.0)
    assert {(receipt.worker, receipt.outcome, receipt.version) for receipt in receipts} == {
        (worker, Outcome.APPLIED, Version(1, 1)) for worker in "abc"
    }
    assert target.can_save


def test_a_round_closes_when_the_one_it_waits_for_leaves() -> None:
    target = bsp("a", "b")
    target.push(push(FIRST, V0, worker="a"), now=1.0)
    assert target.leave("b", now=2.0) == (Receipt("a", FIRST, Outcome.APPLIED, Version(1, 1)),)
    assert target.leave("a", now=3.0) == ()


def test_what_a_dead_worker_pushed_stays() -> None:
    target = bsp("a", "b")
    target.push(push(FIRST, V0, worker="a", values=randoms(0)), now=1.0)
    assert target.leave("a", now=2.0) == ()
    receipts = target.push(push(SECOND, V0, worker="b", values=randoms(1)), now=3.0)
    assert [receipt.worker for receipt in receipts] == ["a", "b"]
    np.testing.assert_array_equal(target.published, START - np.float32(0.1) * ((randoms(0) + randoms(1)) / 2))


def test_a_round_closes_when_nothing_of_the_epoch_is_outstanding() -> None:
    target = bsp("a", "b")
    for number in range(GRID.num_batches - 1):
        target.push(push(batch_at(number), target.version, worker="ab"[number % 2]), now=1.0)
    assert target.version.updates == 4
    assert len(target.push(push(batch_at(8), target.version, worker="a"), now=1.0)) == 1
    assert (target.version.updates, target.epochs) == (5, 1)


def test_a_joiner_is_waited_for() -> None:
    target = bsp("a")
    target.join("b", now=0.0)
    target.join("b", now=0.5)  # joining again changes nothing
    assert target.push(push(FIRST, V0, worker="a"), now=1.0) == ()
    assert len(target.push(push(SECOND, V0, worker="b"), now=1.0)) == 2
    assert target.clocks == target.report().worker_pushes == {"a": 1, "b": 1}


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_a_round_is_summed_in_the_batches_order_whatever_the_order_of_arrival(order: tuple[int, ...]) -> None:
    target = bsp("worker-0", "worker-1", "worker-2")
    for number in order:
        target.push(push(batch_at(number), V0, worker=f"worker-{number}", values=randoms(number)), now=1.0)
    mean = ((randoms(0) + randoms(1)) + randoms(2)) / np.float32(3)
    np.testing.assert_array_equal(target.published, START - np.float32(0.1) * mean)


def test_the_order_of_a_sum_is_seen_in_its_bits() -> None:
    """Check that the test above can fail: the sums of another order differ."""
    sums = {(randoms(i) + randoms(j) + randoms(k)).tobytes() for i, j, k in permutations(range(3))}
    assert len(sums) > 1


def test_a_short_batch_weighs_by_its_examples() -> None:
    target = bsp("a", "b")
    target.push(push(FIRST, V0, worker="a", values=randoms(0), examples=32), now=1.0)
    target.push(push(SECOND, V0, worker="b", values=randoms(1), examples=8), now=1.0)
    mean = (32 * randoms(0) + 8 * randoms(1)) / 40
    np.testing.assert_allclose(target.published, START - 0.1 * mean, rtol=1e-6)
    assert target.report().samples == 40


def test_a_stale_read_is_requeued_when_the_round_closes_and_is_heard() -> None:
    target = bsp("a", "b")
    for worker, batch in (("a", FIRST), ("b", SECOND)):
        target.push(push(batch, V0, worker=worker), now=1.0)
    assert target.push(push(batch_at(2), V0, worker="a"), now=2.0) == ()
    receipts = target.push(push(batch_at(3), Version(1, 1), worker="b"), now=2.0)
    assert outcomes(receipts) == [Outcome.REQUEUED, Outcome.APPLIED]
    assert target.version.updates == 2


def test_a_duplicate_is_heard_and_adds_nothing() -> None:
    target = bsp("a", "b")
    for worker, batch in (("a", FIRST), ("b", SECOND)):
        target.push(push(batch, V0, worker=worker), now=1.0)
    before = target.published.copy()
    target.push(push(FIRST, Version(1, 1), worker="a", values=randoms(9)), now=2.0)
    receipts = target.push(push(batch_at(2), Version(1, 1), worker="b", values=randoms(2)), now=2.0)
    assert outcomes(receipts) == [Outcome.DUPLICATE, Outcome.APPLIED]
    np.testing.assert_array_equal(target.published, before - np.float32(0.1) * randoms(2))


def test_a_buffered_batch_is_a_duplicate_already() -> None:
    target = bsp("a", "b", "c")
    target.push(push(FIRST, V0, worker="a"), now=1.0)
    target.push(push(FIRST, V0, worker="b"), now=1.0)
    assert target.report().pushes["buffered"] == 1
    assert target.report().pushes["duplicate"] == 1


def test_a_round_of_refusals_is_no_step() -> None:
    target = bsp("a", "b")
    fill(target, [FIRST])  # pushed by a worker that holds no lease
    target.push(push(SECOND, target.version, worker="a", loss=float("nan")), now=1.0)
    receipts = target.push(push(SECOND, target.version, worker="b", loss=float("nan")), now=1.0)
    assert Counter(outcomes(receipts))[Outcome.REJECTED] == 2
    assert target.version.updates == 1


# Clipping and buffers


@pytest.mark.parametrize("length", [0.1, 0.999, 1.0, 3.0, 1e6])
def test_long_gradients_are_clipped_as_torch_does(length: float) -> None:
    values = randoms(0)
    values *= np.float32(length) / np.linalg.norm(values)
    target = server(optimizer={"lr": 1.0, "max_grad_norm": 1.0})
    target.push(push(FIRST, V0, values=values), now=1.0)
    parameter = torch.zeros(len(values), requires_grad=True)
    parameter.grad = torch.from_numpy(values.copy())
    torch.nn.utils.clip_grad_norm_([parameter], 1.0)
    np.testing.assert_allclose(START - target.published, parameter.grad.numpy(), rtol=1e-5, atol=1e-6)


def test_the_norm_of_the_whole_gradient_decides_not_that_of_the_slice() -> None:
    target = server(optimizer={"lr": 1.0, "max_grad_norm": 1.0})
    target.push(push(FIRST, V0, values=np.full_like(START, 0.01), norm=10.0), now=1.0)
    np.testing.assert_allclose(START - target.published, 0.001, rtol=1e-3)


def test_gradients_are_clipped_one_by_one_before_averaging() -> None:
    target = bsp("a", "b", optimizer={"lr": 1.0, "max_grad_norm": 1.0})
    long = np.zeros_like(START)
    short = np.zeros_like(START)
    long[0] = 100
    short[1] = 0.5
    target.push(push(FIRST, V0, worker="a", values=long), now=1.0)
    target.push(push(SECOND, V0, worker="b", values=short), now=1.0)
    np.testing.assert_allclose((START - target.published)[:3], [0.5, 0.25, 0], atol=1e-6)


@pytest.mark.parametrize("norm", [1.0, 1e6])
def test_buffers_move_at_rate_1_and_are_neither_clipped_nor_decayed(norm: float) -> None:
    optimizer = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.5, "max_grad_norm": 2.0}
    target = server(partition=Partition(0, 0, 6, 4), optimizer=optimizer)
    for number in range(2):
        target.push(push(batch_at(number), V0, values=np.full_like(START, 0.25), norm=norm), now=1.0)
    np.testing.assert_array_equal(target.published[4:], START[4:] - np.float32(0.5))
    assert target.state().arrays["optimizer.velocity"].shape == (4,)


def test_buffers_in_a_round_are_averaged_by_examples() -> None:
    target = ParameterServer(job("bsp"), Partition(0, 0, 6, 4), START, GRID, V0)
    for worker in "ab":
        target.join(worker, now=0.0)
    target.push(push(FIRST, V0, worker="a", examples=3, values=np.full_like(START, 1)), now=1.0)
    target.push(push(SECOND, V0, worker="b", examples=1, values=np.full_like(START, 2)), now=1.0)
    np.testing.assert_allclose(target.published[4:], START[4:] - 1.25, rtol=1e-6)


# Accounting


@st.composite
def schedules(draw: st.DrawFn) -> list[tuple[str, str, int, int, bool]]:
    """Draw events as (name, worker, position, number of steps that the version read is behind, finite)."""
    event = st.tuples(
        st.sampled_from(["push"] * 6 + ["join", "leave"]),
        st.sampled_from("abc"),
        st.integers(0, 2 * GRID.num_batches - 1),
        st.integers(-1, 3),
        st.sampled_from([True] * 5 + [False]),
    )
    return draw(st.lists(event, max_size=40))


@pytest.mark.parametrize("mode", ["async", "bsp"])
@given(schedules())
def test_every_push_is_accounted_for_and_versions_are_steps(
    mode: str, schedule: list[tuple[str, str, int, int, bool]]
) -> None:
    target = server(mode)
    pushed = Counter[str]()
    receipts = 0
    weights = target.published.copy()
    for event, worker, position, behind, finite in schedule:
        version = target.version
        if event == "push":
            read = Version(1, max(0, version.updates - behind))
            gradient = push(batch_at(position), read, worker=worker, loss=1.0 if finite else float("nan"))
            pushed["all"] += 1
            given_out = target.push(gradient, now=1.0)
        else:
            given_out = target.join(worker, 1.0) if event == "join" else target.leave(worker, 1.0)
        receipts += len(given_out)
        report = target.report()
        assert sum(report.pushes.values()) == pushed["all"]
        assert pushed["all"] - receipts >= len(report.parked)
        assert sum(report.staleness.values()) == report.pushes["applied"] == report.samples
        in_state = report.epochs * GRID.num_batches + sum(int(bitmap.sum()) for bitmap in report.settled.values())
        assert in_state == report.pushes["applied"] + report.pushes["buffered"]
        stepped = not np.array_equal(weights, target.published)
        assert report.version.updates - version.updates == int(stepped)
        assert all(receipt.version == target.version for receipt in given_out)
        weights = target.published.copy()
    assert target.report().pushes["discarded"] == 0
    assert len(target.journal) == len(schedule)


# Epochs


def test_the_weights_at_an_epochs_end_are_kept() -> None:
    target = server()
    kept = {}
    for epoch in range(3):
        fill(target, [GRID.batch(epoch, position) for position in range(GRID.num_batches)])
        kept[epoch + 1] = target.published.copy()
    fill(target, [BatchId(3, 0, 0)])
    for epochs in (2, 3):
        np.testing.assert_array_equal(target.epoch_weights(epochs), kept[epochs])
    np.testing.assert_array_equal(target.epoch_weights(None), target.published)
    for epochs in (1, 4):
        with pytest.raises(WeightsNotKeptError):
            target.epoch_weights(epochs)


def test_copies_of_weights_are_not_shared() -> None:
    target = server()
    fill(target, [GRID.batch(0, position) for position in range(GRID.num_batches)])
    for epochs in (1, None):
        before = target.epoch_weights(epochs)
        target.epoch_weights(epochs)[:] = 0
        np.testing.assert_array_equal(target.epoch_weights(epochs), before)


def test_training_loss_is_the_mean_over_an_epochs_examples() -> None:
    target = server()
    target.push(push(FIRST, V0, loss=1.0, examples=30), now=1.0)
    target.push(push(SECOND, V0, loss=3.0, examples=10), now=1.0)
    target.push(push(SECOND, V0, loss=9.0, examples=10), now=1.0)  # a duplicate
    target.push(push(batch_at(2), V0, loss=float("nan"), examples=10), now=1.0)
    assert target.report().losses[0].mean == 1.5


def test_rates_count_from_the_first_step() -> None:
    target = server()
    assert target.report().rate("updates") is None
    for number in range(5):
        target.push(push(batch_at(number), V0, examples=8), now=10.0 + number)
    assert target.report().rate("updates") == 1
    assert target.report().rate("samples") == 8


# State


def restored(spec: JobSpec, target: ParameterServer) -> ParameterServer:
    return ParameterServer.restore(spec, GRID, target.state(), incarnation=2, now=5.0)


@pytest.mark.parametrize("done", [0, 1, 4, 9, 13, 18])
@pytest.mark.parametrize("mode", ["async", "bsp"])
def test_a_restored_server_goes_on_bit_for_bit(mode: str, done: int) -> None:
    spec = job(mode, optimizer=MOMENTUM)
    undisturbed = ParameterServer(spec, WHOLE, START, GRID, V0)
    fill(undisturbed, [batch_at(number) for number in range(done)])
    again = restored(spec, undisturbed)
    assert again.version == Version(2, done)
    assert again.epochs == undisturbed.epochs
    for target in (undisturbed, again):
        fill(target, [batch_at(number) for number in range(done, 27)])
    np.testing.assert_array_equal(again.published, undisturbed.published)
    ours = again.report()
    theirs = undisturbed.report()
    for name in ("epochs", "pushes", "staleness", "losses", "samples", "worker_pushes", "parked"):
        assert getattr(ours, name) == getattr(theirs, name), name
    np.testing.assert_array_equal(again.epoch_weights(3), undisturbed.epoch_weights(3))


def test_a_state_is_a_copy() -> None:
    target = server(optimizer=MOMENTUM)
    fill(target, [FIRST, SECOND])
    state = target.state()
    before = {name: array.copy() for name, array in state.arrays.items()}
    fill(target, [batch_at(2)])
    restored(job(optimizer=MOMENTUM), target).push(push(batch_at(3), V0), now=1.0)
    assert set(before) == {"weights", "settled.0", "optimizer.velocity"}
    for name, array in before.items():
        np.testing.assert_array_equal(state.arrays[name], array)


def test_what_is_applied_stays_applied_over_a_restart() -> None:
    target = server()
    fill(target, [FIRST, SECOND])
    assert outcomes(restored(job(), target).push(push(SECOND, V0), now=6.0)) == [Outcome.DUPLICATE]


def test_a_server_restored_at_an_epochs_end_has_its_weights() -> None:
    target = server()
    fill(target, [GRID.batch(0, position) for position in range(GRID.num_batches)])
    np.testing.assert_array_equal(restored(job(), target).epoch_weights(1), target.published)


def test_half_a_round_is_no_state() -> None:
    target = bsp("a", "b")
    target.push(push(FIRST, V0, worker="a"), now=1.0)
    with pytest.raises(AssertionError, match="a round is open"):
        target.state()


# Journal


def test_the_journal_tells_what_happened_in_order() -> None:
    target = bsp("a", "b")
    target.push(push(FIRST, V0, worker="a"), now=1.0)
    target.push(push(SECOND, V0, worker="b"), now=2.0)
    target.push(push(FIRST, Version(1, 1), worker="a"), now=3.0)
    target.leave("b", now=4.0)
    records = target.journal.take()
    kinds = [RecordKind.JOIN, RecordKind.JOIN, RecordKind.PUSH, RecordKind.PUSH, RecordKind.PUSH, RecordKind.LEAVE]
    assert records["kind"].tolist() == kinds
    assert records["worker"].tolist() == [b"a", b"b", b"a", b"b", b"a", b"b"]
    told = [list(Outcome)[number] for number in records["outcome"][2:5]]
    assert told == [Outcome.BUFFERED, Outcome.APPLIED, Outcome.DUPLICATE]
    assert records["updates"].tolist() == [0, 0, 0, 1, 1, 1]
    assert records["now"].tolist() == [0, 0, 1, 2, 3, 4]


def test_a_restored_servers_journal_begins_with_the_fork() -> None:
    target = server()
    fill(target, [FIRST, SECOND])
    record = restored(job(), target).journal.take()[0]
    assert record["kind"] == RecordKind.FORK
    assert (record["read_incarnation"], record["read_updates"]) == (1, 2)
    assert (record["incarnation"], record["updates"]) == (2, 2)


# Computing times


def longest(target: ParameterServer, batch: BatchId, now: float, says_s: float) -> float:
    """Return the longest computing time, after a push at `now` that reports `says_s` seconds."""
    target.push(push(batch, target.version)._replace(compute_s=says_s), now)
    return target.report().longest_s


def test_a_batch_took_as_long_as_its_worker_says() -> None:
    target = server()
    target.join("worker-0", now=5.0)
    assert longest(target, FIRST, 7.0, says_s=2.0) == 2.0
    assert longest(target, SECOND, 10.0, says_s=2.5) == 2.5


def test_a_batch_took_no_longer_than_since_its_worker_was_heard_of() -> None:
    target = server()
    target.join("worker-0", now=5.0)
    assert longest(target, FIRST, 7.0, says_s=1e8) == pytest.approx(2.0, abs=0.02)
    target.join("worker-0", now=7.5)  # another lease, while it computes
    assert longest(target, SECOND, 10.0, says_s=1e8) == pytest.approx(3.0, abs=0.02)
    recorded = target.journal.take()["compute_s"].tolist()
    assert recorded == pytest.approx([0, 2, 0, 3], abs=0.02), "the journal must have the limited times as well"


def test_a_push_that_is_refused_is_a_sign_of_life_as_well() -> None:
    target = server()
    target.join("worker-0", now=0.0)
    assert longest(target, FIRST, 1.0, says_s=1.0) == 1.0
    assert longest(target, FIRST, 9.0, says_s=8.0) == 1.0, "a duplicate is in no round"
    assert longest(target, SECOND, 11.0, says_s=1e8) == pytest.approx(2.0, abs=0.02)


def test_of_a_worker_without_a_lease_no_time_is_believed() -> None:
    target = server()
    assert longest(target, FIRST, 100.0, says_s=1e8) < 0.02
    target.join("worker-0", now=100.0)
    target.leave("worker-0", now=101.0)
    assert longest(target, SECOND, 200.0, says_s=1e8) < 0.02


def test_a_worker_that_says_it_is_slow_gets_no_more_of_the_rate_than_it_can_be() -> None:
    """Check a worker that reports an impossible time, because `rescaled` gives slow workers larger steps."""
    weights = []
    for says in (3.0, 1e8):
        target = server(workers=2, correction={"name": "rescaled"}, optimizer={"lr": 0.1})
        for worker in ("worker-0", "worker-1"):
            target.join(worker, now=0.0)
        target.push(push(FIRST, V0)._replace(compute_s=3.0), 3.0)
        target.push(push(SECOND, V0, worker="worker-1")._replace(compute_s=says), 3.0)
        weights.append(target.weights)
    np.testing.assert_allclose(weights[0], weights[1], atol=0.01)


def test_weights_of_another_size_are_a_bug_of_the_caller() -> None:
    with pytest.raises(AssertionError):
        ParameterServer(job(), Partition(0, 0, 5, 5), START, GRID, V0)


# The moving average


def test_the_average_is_evaluated_and_the_weights_are_shown() -> None:
    target = server(optimizer={"lr": 0.1, "ema": 0.5})
    average = START.copy()
    for number in range(5):
        fill(target, [batch_at(number)])
        decay = min(0.5, (2 + number) / (11 + number))
        average += (1 - decay) * (target.published - average)
        np.testing.assert_allclose(target.epoch_weights(None), average, rtol=1e-6)
    np.testing.assert_array_equal(target.weights, target.published)
    assert not np.allclose(target.published, average)


def test_the_average_is_part_of_the_state() -> None:
    spec = job(optimizer={"lr": 0.1, "ema": 0.9})
    whole = server(optimizer={"lr": 0.1, "ema": 0.9})
    half = server(optimizer={"lr": 0.1, "ema": 0.9})
    fill(whole, [batch_at(number) for number in range(6)])
    fill(half, [batch_at(number) for number in range(3)])
    again = ParameterServer.restore(spec, GRID, half.state(), incarnation=2, now=5.0)
    fill(again, [batch_at(number) for number in range(3, 6)])
    np.testing.assert_array_equal(again.epoch_weights(None), whole.epoch_weights(None))


def test_an_epochs_end_keeps_the_average_of_that_instant() -> None:
    target = server(optimizer={"lr": 0.1, "ema": 0.9})
    fill(target, [batch_at(number) for number in range(GRID.num_batches)])
    then = target.epoch_weights(None)
    fill(target, [batch_at(GRID.num_batches)])
    np.testing.assert_array_equal(target.epoch_weights(1), then)


# Skipped batches, and partitions restored alone


def test_what_is_done_without_is_settled_and_what_comes_of_it_later_a_duplicate() -> None:
    target = server()
    assert target.skip(FIRST, now=1.0) == ()
    target.skip(FIRST, now=2.0)  # no-op: it is settled
    (receipt,) = target.push(push(FIRST, V0), now=3.0)
    assert receipt.outcome is Outcome.DUPLICATE
    np.testing.assert_array_equal(target.weights, START)
    assert target.report().contained(GRID) == 1
    assert (target.journal.take()["kind"] == RecordKind.SKIP).sum() == 1


def test_what_is_contained_cannot_be_done_without_any_more() -> None:
    target = server()
    target.push(push(FIRST, V0), now=1.0)
    weights = target.weights
    target.skip(FIRST, now=2.0)
    np.testing.assert_array_equal(target.weights, weights)
    assert target.state().part("skipped") == {}


def test_a_round_does_not_wait_for_what_is_done_without() -> None:
    target = bsp("a", "b")
    for number in range(GRID.num_batches - 2):
        target.skip(batch_at(number), now=1.0)
    assert target.push(push(batch_at(GRID.num_batches - 2), V0, worker="a"), now=2.0) == ()
    (receipt,) = target.skip(batch_at(GRID.num_batches - 1), now=3.0)
    assert (receipt.worker, receipt.outcome, target.epochs) == ("a", Outcome.APPLIED, 1)


def test_an_epochs_end_is_kept_though_a_later_epoch_began_before_it() -> None:
    """Push a batch of the next epoch early, admitted or refused, as when workers are ahead of a restored partition."""
    for read in (V0, Version(9, 0)):
        target = server()
        fill(target, [batch_at(number) for number in range(GRID.num_batches - 1)])
        target.push(push(batch_at(GRID.num_batches), read), now=2.0)
        fill(target, [batch_at(GRID.num_batches - 1)])
        np.testing.assert_array_equal(target.epoch_weights(1), target.weights)


def test_a_partition_restored_within_an_epoch_has_no_weights_of_its_beginning() -> None:
    half = server()
    fill(half, [batch_at(number) for number in range(GRID.num_batches + 2)])
    again = ParameterServer.restore(job(), GRID, half.state(), incarnation=2, now=5.0)
    again.leave("worker-0", now=6.0)
    with pytest.raises(WeightsNotKeptError):
        again.epoch_weights(1)
