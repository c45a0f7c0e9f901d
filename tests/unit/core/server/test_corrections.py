from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from psgd.core.server import optimizers
from psgd.core.server.corrections import Correction, build_correction
from psgd.core.server.live_worker import LiveWorker
from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.partitions import Partition
from psgd.spec import JobSpec
from psgd_workers.messages import BatchId, FloatArray, Gradient, Version
from tests.support.jobs import GRID, START, job, push

SIZE = len(START)
LR = 0.1
STEPS = 12
V0 = Version(1, 0)
WHOLE = Partition(0, 0, SIZE, SIZE)
DC_ASGD: list[dict[str, Any]] = [
    {"name": "dc_asgd"},
    {"name": "dc_asgd", "variant": "adaptive"},
    {"name": "dc_asgd", "strength": 0.5},
]
GAP_AWARE: dict[str, Any] = {"name": "gap_aware"}
DANA: dict[str, Any] = {"name": "dana", "momentum": 0.9}
READING: list[dict[str, Any]] = [*DC_ASGD, GAP_AWARE]  # they need the weights that a gradient was computed from
ALL: list[dict[str, Any]] = [
    {"name": "none"},
    {"name": "staleness_lr"},
    {"name": "delay_adaptive"},
    *READING,
    DANA,
    {"name": "rescaled"},
]

Float64 = NDArray[np.float64]


def spec(correction: dict[str, Any], workers: int = 4, **sections: Any) -> JobSpec:
    return job(workers=workers, correction=correction, **sections)


def build(correction: dict[str, Any], workers: int = 4) -> Correction:
    return build_correction(spec(correction, workers), SIZE)


def server(correction: dict[str, Any], **sections: Any) -> ParameterServer:
    return ParameterServer(spec(correction, **sections), WHOLE, START, GRID, V0)


def randoms(*seed: int) -> FloatArray:
    return np.random.default_rng(seed).standard_normal(SIZE, dtype=np.float32)


def show_step(correction: Correction, direction: FloatArray) -> None:
    """Show the correction the direction of a step, in two blocks."""
    watch = correction.watch()
    if watch is not None:
        for part in (slice(0, 2), slice(2, SIZE)):
            watch(part, direction[part])


def batch_at(number: int) -> BatchId:
    return GRID.batch(number // GRID.num_batches, number % GRID.num_batches)


def timed(worker: str, seconds: float) -> Gradient:
    return push(batch_at(0), V0, worker=worker)._replace(compute_s=seconds)


# Rates


@given(st.integers(0, 1000))
def test_staleness_lr_divides_the_rate_by_the_staleness(staleness: int) -> None:
    factor = build({"name": "staleness_lr"}).factor(timed("a", 1), staleness, LiveWorker())
    assert factor * max(1, staleness) == pytest.approx(1, rel=1e-15)


@given(st.integers(1, 64), st.integers(0, 1000))
def test_delay_adaptive_leaves_alone_what_is_no_staler_than_there_are_workers(workers: int, staleness: int) -> None:
    factor = build({"name": "delay_adaptive"}, workers).factor(timed("a", 1), staleness, LiveWorker())
    assert factor * max(workers, staleness) == pytest.approx(workers, rel=1e-15)
    assert (factor == 1) == (staleness <= workers)


def rescaled_factors(correction: Correction | None = None) -> Callable[[str, float], float]:
    """Return a function (worker, computing time in seconds) -> factor. Every worker has a lease."""
    rescaled = build({"name": "rescaled"}) if correction is None else correction
    live = defaultdict[str, LiveWorker](LiveWorker)
    return lambda worker, seconds: rescaled.factor(timed(worker, seconds), 0, live[worker])


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 1000)), min_size=1, max_size=30))
def test_rescaled_rates_are_in_proportion_to_the_mean_compute_times(pushes: list[tuple[str, int]]) -> None:
    rescaled = rescaled_factors()
    times: dict[str, list[float]] = {}
    for worker, seconds in pushes:
        factor = rescaled(worker, seconds)
        times.setdefault(worker, []).append(seconds)
        means = {name: float(np.mean(measured)) for name, measured in times.items()}
        assert factor == pytest.approx(means[worker] / np.mean(list(means.values())), rel=1e-9)


def test_rescaled_gives_workers_equal_weight_whatever_their_pace() -> None:
    rescaled = rescaled_factors()
    moved = {"fast": 0.0, "slow": 0.0}
    for worker in ("fast", "slow"):  # from now on the mean is over both workers
        rescaled(worker, {"fast": 1, "slow": 4}[worker])
    for worker in ["fast", "fast", "fast", "fast", "slow"] * 3:
        moved[worker] += rescaled(worker, {"fast": 1, "slow": 4}[worker])
    assert moved["fast"] == pytest.approx(moved["slow"])


def test_rescaled_forgets_who_leaves() -> None:
    correction = build({"name": "rescaled"})
    rescaled = rescaled_factors(correction)
    rescaled("slow", 9)
    assert rescaled("fast", 1) == pytest.approx(1 / 5)
    correction.leave("slow")
    assert rescaled("fast", 1) == 1


def test_rescaled_leaves_a_worker_without_a_lease_alone() -> None:
    correction = build({"name": "rescaled"})
    rescaled_factors(correction)("slow", 9)
    assert correction.factor(timed("gone", 1), 0, None) == 1
    assert rescaled_factors(correction)("fast", 1) == pytest.approx(1 / 5)


def test_rescaled_bears_times_of_0() -> None:
    assert rescaled_factors()("a", 0) == 1


@pytest.mark.parametrize("correction", [{"name": "none"}, *READING, DANA], ids=str)
def test_the_others_leave_the_rate_alone(correction: dict[str, Any]) -> None:
    assert {build(correction).factor(timed("a", 1), staleness, LiveWorker()) for staleness in (0, 1, 100)} == {1.0}


# Values


class Formula:
    """The elementwise corrections in float64, as the papers write them."""

    def __init__(self, correction: dict[str, Any]) -> None:
        self._name = correction["name"]
        self._adaptive = correction.get("variant") == "adaptive"
        self._strength = correction.get("strength", 2.0 if self._adaptive else 0.04)
        self._squares = np.zeros(SIZE)
        self._steps = 0

    def corrected(self, values: FloatArray, weights: Float64, read: Float64) -> Float64:
        """Return g + λ·g⊙g⊙(w - w_read), or g / (1 + |w - w_read| / C)."""
        g = values.astype(np.float64)
        if self._name == "gap_aware":
            mean = self._squares / (1 - 0.999**self._steps) if self._steps else np.zeros(SIZE)
            usual_change = LR * (np.sqrt(mean) + 1e-8) if self._steps else np.full(SIZE, 1)
            return g / (1 + np.abs(weights - read) / usual_change)
        strength: Any = self._strength
        if self._adaptive:
            self._squares = 0.95 * self._squares + 0.05 * g * g
            strength = self._strength / np.sqrt(self._squares + 1e-7)
        corrected: Float64 = g + strength * g * g * (weights - read)
        return corrected

    def stepped(self, direction: Float64) -> None:
        if self._name == "gap_aware":
            self._squares = 0.999 * self._squares + 0.001 * direction * direction
            self._steps += 1


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("correction", READING, ids=str)
@pytest.mark.parametrize("lags", [(0,), (1,), (0, 3, 1, 5)])
def test_stale_gradients_are_corrected_by_the_formula(
    correction: dict[str, Any], momentum: float, lags: tuple[int, ...]
) -> None:
    target = server(correction, optimizer={"lr": LR, "momentum": momentum})
    formula = Formula(correction)
    history = [START.astype(np.float64)]
    velocity = np.zeros(SIZE)
    published = [START.copy()]  # the weights that workers pull, by version
    for number in range(STEPS):
        read = max(0, number - lags[number % len(lags)])
        gradient = push(batch_at(number), Version(1, read), values=randoms(number))
        target.push(gradient._replace(weights_read=published[read]), now=1.0)
        corrected = formula.corrected(randoms(number), history[-1], history[read])
        velocity = momentum * velocity + corrected
        formula.stepped(velocity)
        history.append(history[-1] - LR * velocity)
        published.append(target.published.copy())
        np.testing.assert_allclose(target.published, history[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("correction", READING, ids=str)
def test_many_blocks_correct_like_one_to_the_bit(
    correction: dict[str, Any], momentum: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = {"lr": LR, "momentum": momentum, "ema": 0.9}
    whole = server(correction, optimizer=optimizer)
    monkeypatch.setattr(optimizers, "BLOCK", 3)
    blocked = server(correction, optimizer=optimizer)
    for target in (whole, blocked):
        drive(target, range(STEPS))
    arrays = blocked.state().arrays
    expected = whole.state().arrays
    assert {name: array.tobytes() for name, array in arrays.items()} == {
        name: array.tobytes() for name, array in expected.items()
    }


@pytest.mark.parametrize("correction", READING, ids=str)
def test_without_a_gap_gradients_are_left_alone_to_the_bit(correction: dict[str, Any]) -> None:
    corrected = build(correction)
    weights = randoms(99)
    for number in range(STEPS):
        values = randoms(number)
        np.testing.assert_array_equal(corrected.correct("a", values, weights, weights.copy()), values)
        show_step(corrected, values)


@given(st.integers(0, 2**32), st.integers(1, 5))
def test_gap_aware_shortens_every_value_and_turns_none(seed: int, steps: int) -> None:
    gap_aware = build(GAP_AWARE)
    values = randoms(seed, 0)
    for number in range(steps):
        show_step(gap_aware, randoms(seed, 1, number))
    corrected = gap_aware.correct("a", values, randoms(seed, 2), randoms(seed, 3))
    assert (np.abs(corrected) <= np.abs(values)).all()
    assert (np.signbit(corrected) == np.signbit(values)).all()


def test_gap_aware_halves_after_a_usual_step() -> None:
    gap_aware = build(GAP_AWARE)
    direction = np.full(SIZE, 0.5, np.float32)
    for _ in range(3):
        show_step(gap_aware, direction)
    corrected = gap_aware.correct("a", np.ones(SIZE, np.float32), START, START - np.float32(LR) * direction)
    np.testing.assert_allclose(corrected, 0.5, rtol=1e-5)


@pytest.mark.parametrize("correction", [*READING, DANA], ids=str)
def test_what_is_corrected_and_read_may_be_read_only(correction: dict[str, Any]) -> None:
    corrected = build(correction)
    values = randoms(0)
    weights = randoms(1)
    read = randoms(2)
    for array in (values, weights, read):
        array.flags.writeable = False
    for _ in range(3):
        corrected.correct("a", values, weights, read)
        show_step(corrected, values)


def test_clipping_comes_before_the_correction() -> None:
    optimizer = {"lr": 1.0, "max_grad_norm": 1.0, "clip_value": 0.5}
    target = server({"name": "dc_asgd", "strength": 2.0}, optimizer=optimizer)
    values = np.zeros(SIZE, np.float32)
    read = START - np.float32(0.25)
    values[:2] = 30, 40  # the limit of the norm makes them 0.6 and 0.8, the limit of each value then 0.5
    target.push(push(batch_at(0), V0, values=values)._replace(weights_read=read), now=1.0)
    np.testing.assert_allclose((START - target.published)[:3], [0.5 + 2 * 0.25 * 0.25] * 2 + [0], rtol=1e-5)


@pytest.mark.parametrize("correction", READING, ids=str)
def test_buffers_are_not_corrected(correction: dict[str, Any]) -> None:
    target = ParameterServer(spec(correction), Partition(0, 0, SIZE, SIZE - 2), START, GRID, V0)
    for number in range(2):
        gradient = push(batch_at(number), V0, values=np.full(SIZE, 0.25, np.float32))
        target.push(gradient._replace(weights_read=START - 1), now=1.0)
    np.testing.assert_array_equal(target.published[-2:], START[-2:] - np.float32(0.5))


# Dana


def expected_weights(pushes: Sequence[str], momentum: float) -> tuple[Float64, Float64]:
    """Return the weights, and the weights that workers pull, after a push of each worker; "-a" lets a leave."""
    weights = START.astype(np.float64)
    velocities = dict[str, Float64]()
    shown = weights
    for number, worker in enumerate(pushes):
        if worker.startswith("-"):
            velocities.pop(worker[1:], None)
            continue
        velocities[worker] = momentum * velocities.get(worker, np.zeros(SIZE)) + randoms(number)
        weights = weights - LR * velocities[worker]
        shown = weights - LR * momentum * sum(velocities.values())
    return weights, shown


@pytest.mark.parametrize("pushes", ["aaaaaa", "abcabc", "aabacbbcac"])
@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_dana_is_a_plain_loop(pushes: str, momentum: float) -> None:
    target = server({"name": "dana", "momentum": momentum})
    for number, worker in enumerate(pushes):
        target.push(push(batch_at(number), target.version, worker=worker, values=randoms(number)), now=1.0)
    weights, shown = expected_weights(pushes, momentum)
    np.testing.assert_allclose(target.epoch_weights(None), weights, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(target.published, shown, rtol=1e-5, atol=1e-6)


def test_a_worker_that_leaves_takes_its_momentum_along() -> None:
    target = server(DANA)
    pushes = ["a", "b", "a", "-a", "b", "c", "-c", "a", "b"]
    for number, worker in enumerate(pushes):
        if worker.startswith("-"):
            target.leave(worker[1:], now=1.0)
        else:
            target.push(push(batch_at(number), target.version, worker=worker, values=randoms(number)), now=1.0)
    weights, shown = expected_weights(pushes, 0.9)
    np.testing.assert_allclose(target.epoch_weights(None), weights, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(target.published, shown, rtol=1e-5, atol=1e-6)


def test_once_all_have_left_dana_shows_the_weights_to_the_bit() -> None:
    dana = build(DANA)
    for number, worker in enumerate("abcab"):
        dana.correct(worker, randoms(number), START, None)
    for worker in "bac":
        dana.leave(worker)
    shown = np.empty_like(START)
    dana.publish(START, LR, shown)
    np.testing.assert_array_equal(shown, START)


def test_dana_with_one_worker_shows_where_nesterov_looks() -> None:
    target = server(DANA)
    lookahead = START.astype(np.float64)
    velocity = np.zeros(SIZE)
    for number in range(STEPS):
        gradient = target.published * np.float32(0.5)
        target.push(push(batch_at(number), target.version, values=gradient), now=1.0)
        velocity = 0.9 * velocity + 0.5 * lookahead  # as torch's nesterov, whose weights are Dana's look-ahead
        lookahead = lookahead - LR * (0.5 * lookahead + 0.9 * velocity)
    np.testing.assert_allclose(target.published, lookahead, rtol=1e-4, atol=1e-6)


# State


def drive(target: ParameterServer, numbers: range) -> None:
    """Push by two workers, each with gradients that are two versions old, and with the initial weights."""
    for number in numbers:
        read = target.version._replace(updates=max(0, target.version.updates - 2))
        gradient = push(batch_at(number), Version(1, min(read.updates, 5)), worker="ab"[number % 2])
        target.push(gradient._replace(values=randoms(number), weights_read=START), now=1.0)


@pytest.mark.parametrize("done", [0, 1, 5])
@pytest.mark.parametrize("correction", [c for c in ALL if c["name"] not in ("dana", "rescaled")], ids=str)
def test_a_restored_server_goes_on_bit_for_bit(correction: dict[str, Any], done: int) -> None:
    chosen = spec(correction, optimizer={"lr": LR, "momentum": 0.9})
    undisturbed = ParameterServer(chosen, WHOLE, START, GRID, V0)
    drive(undisturbed, range(done))
    state = undisturbed.state()
    on_disk = type(state)(state.arrays, json.loads(json.dumps(state.metadata)))
    again = ParameterServer.restore(chosen, GRID, on_disk, incarnation=2, now=2.0)
    for number in range(done, done + 6):  # computed from a version before the fork, which both servers know
        for target in (undisturbed, again):
            gradient = push(batch_at(number), Version(1, min(done, 2)), worker="ab"[number % 2], values=randoms(number))
            target.push(gradient._replace(weights_read=START), now=3.0)
    assert again.version.updates == undisturbed.version.updates == done + 6
    np.testing.assert_array_equal(again.published, undisturbed.published)


@pytest.mark.parametrize("correction", READING, ids=str)
def test_a_state_is_a_copy(correction: dict[str, Any]) -> None:
    first = build(correction)
    second = build(correction)
    for number in range(3):
        first.correct("a", randoms(number), START, randoms(9))
        show_step(first, randoms(number))
    arrays, metadata = first.state()
    before = {name: array.copy() for name, array in arrays.items()}
    second.load(arrays, metadata)
    for target in (first, second):
        target.correct("a", randoms(7), START, randoms(9))
        show_step(target, randoms(7))
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize("correction", [DANA, {"name": "rescaled"}], ids=str)
def test_to_a_restored_server_every_worker_is_new(correction: dict[str, Any]) -> None:
    target = server(correction)
    drive(target, range(4))
    again = ParameterServer.restore(spec(correction), GRID, target.state(), incarnation=2, now=2.0)
    np.testing.assert_array_equal(again.published, target.epoch_weights(None))
    expected = again.published.copy()
    again.push(push(batch_at(5), again.version, worker="a", values=randoms(5)), now=3.0)
    np.testing.assert_array_equal(again.epoch_weights(None), expected - np.float32(LR) * randoms(5))
