from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any
from weakref import ReferenceType, ref

import numpy as np
import pytest
from numpy.typing import NDArray

from psgd_workers.data.examples import Examples
from psgd_workers.data.shards import Shards
from psgd_workers.errors import FrameError, LaneTimeoutError, ServerGoneError, WorkerError
from psgd_workers.gradients.compression import decode
from psgd_workers.gradients.layout import Layout
from psgd_workers.messages import (
    BatchId,
    BatchRange,
    Encoded,
    FloatArray,
    Gradient,
    Lease,
    LeaseEnd,
    Outcome,
    Receipt,
    Version,
)
from psgd_workers.models import Model
from psgd_workers.models.numpy.network import Network
from psgd_workers.spec import LocalSteps, TopKCompression, WorkerOptions
from psgd_workers.transport.lane import LaneKind, Pending
from psgd_workers.transport.memory import Segment
from psgd_workers.worker import Route, Worker

PLAIN = WorkerOptions()
FEATURES = np.random.default_rng(0).standard_normal((22, 3), dtype=np.float32)
TRAIN = Examples(FEATURES, np.arange(22) % 2)
SHARDS = Shards(len(TRAIN), num_shards=2, batch_size=4, seed=1, shuffle=True)
MODEL = Network((3, 2), "cross_entropy")
LAYOUT = Layout.of(MODEL.initial_weights(1))
SIZE = LAYOUT.num_parameters
LEASE = Lease(7, (BatchRange(2, 1, 5, 2), BatchRange(2, 0, 1)))
START = Version(1, 0)
BATCHES = [BatchId(2, 0, 1), BatchId(2, 1, 0), BatchId(2, 0, 0)]


def copied(gradient: Gradient) -> Gradient:
    """Return a copy, as a lane sends it: the worker overwrites its memory afterwards."""
    values = gradient.values
    read = gradient.weights_read
    return gradient._replace(
        values=values if isinstance(values, Encoded) else values.copy(),
        weights_read=None if read is None else read.copy(),
    )


@dataclass
class FakeLane:
    """A server with one worker. Each push is a step, and all calls are recorded."""

    weights: FloatArray
    at: Version = START
    calls: list[str] = field(default_factory=list)
    pushes: list[Gradient] = field(default_factory=list)
    weights_read: list[FloatArray] = field(default_factory=list)  # weights that each push was computed from
    limits: list[float] = field(default_factory=list)
    spoil: Callable[[Receipt], Receipt] = lambda receipt: receipt
    outcome: Outcome = Outcome.APPLIED
    ahead: int = 0  # updates by other workers since the last push, which `version` shows
    kind: LaneKind = "ray"
    slots: list[FloatArray] = field(default_factory=list)  # by slot number, this partition's weights
    segments: list[int] = field(default_factory=list)  # address of each connection's memory
    pendings: list[ReferenceType[FakePending]] = field(default_factory=list)

    def connect(self, segment: Segment, part: slice) -> FakeLane:
        self.slots = [slot.weights[part] for slot in segment.slots]
        self.segments.append(segment.slots[0].gradient.ctypes.data)
        return self

    def hang_up(self) -> None:
        self.calls.append("hang up")

    def close(self) -> None:
        self.calls.append("close")

    def pull(self, slot: int, timeout_s: float) -> Version:
        self.calls.append("pull")
        self.limits.append(timeout_s)
        self.slots[slot][:] = self.weights
        return self.at

    def version(self, timeout_s: float) -> Version:
        self.calls.append("version")
        return self.at._replace(updates=self.at.updates + self.ahead)

    def push(self, gradient: Gradient, slot: int, wants: bool) -> Pending:
        self.calls.append("push and pull" if wants else "push")
        self.pushes.append(copied(gradient))
        self.weights_read.append(self.slots[slot].copy())
        pending = FakePending(self, gradient, self.slots[slot] if wants else None)
        self.pendings.append(ref(pending))
        return pending


@dataclass
class FakePending:
    lane: FakeLane
    gradient: Gradient
    into: FloatArray | None

    def receipt(self, timeout_s: float) -> Receipt:
        lane = self.lane
        lane.calls.append("receipt")
        lane.limits.append(timeout_s)
        lane.weights = lane.weights + 1
        lane.at = lane.at._replace(updates=lane.at.updates + 1)
        if self.into is not None:
            self.into[:] = lane.weights
        receipt = Receipt(self.gradient.worker, self.gradient.batch, lane.outcome, lane.at)
        return lane.spoil(receipt)


class Stub:
    """A model with one trained tensor and one buffer, whose gradients and loss are constants."""

    buffers = ("mean",)

    def __init__(self, gradient: float = 1.0, buffer: float = 0.0, error: Exception | None = None) -> None:
        self._gradient = gradient
        self._buffer = buffer
        self._error = error
        self.seeds: list[int] = []

    def initial_weights(self, seed: int) -> Mapping[str, FloatArray]:
        return {"weight": np.zeros(4, np.float32), "mean": np.zeros(2, np.float32)}

    def loss_and_gradient(
        self,
        weights: Mapping[str, FloatArray],
        features: FloatArray,
        labels: NDArray[Any],
        gradient: Mapping[str, FloatArray],
        seed: int,
    ) -> float:
        if self._error:
            raise self._error
        self.seeds.append(seed)
        gradient["weight"][:] = self._gradient
        gradient["mean"][:] = self._buffer
        return 0.5

    def predict(self, weights: Mapping[str, FloatArray], features: FloatArray) -> FloatArray:
        raise RuntimeError("no outputs")

    def loss(self, outputs: FloatArray, labels: NDArray[Any]) -> float:
        return 0.0


def never() -> bool:
    return False


def worker_of(
    *lanes: FakeLane,
    model: Model = MODEL,
    layout: Layout = LAYOUT,
    shards: Shards = SHARDS,
    worker_options: WorkerOptions = PLAIN,
    timeout_s: float = 60.0,
    pipeline: int = 0,
) -> Worker:
    bounds = np.cumsum([0, *(len(lane.weights) for lane in lanes)])
    parts = [slice(start, stop) for start, stop in pairwise(bounds)]
    routes = [Route(part, partial(lane.connect, part=part)) for part, lane in zip(parts, lanes, strict=True)]
    return Worker("worker-3", model, layout, TRAIN, shards, 1, worker_options, routes, timeout_s, pipeline)


def lane_of(size: int = SIZE) -> FakeLane:
    return FakeLane(np.zeros(size, np.float32))


def stub_pushes(stub: Stub) -> list[Gradient]:
    layout = Layout.of(stub.initial_weights(0), stub.buffers)
    lane = lane_of(layout.num_parameters)
    worker_of(lane, model=stub, layout=layout).work(LEASE, never)
    return lane.pushes


def test_a_lease_is_worked_through_in_its_order() -> None:
    lane = lane_of()
    assert worker_of(lane).work(LEASE, never) == LeaseEnd(7, stopped=False)
    assert [gradient.batch for gradient in lane.pushes] == BATCHES
    assert {gradient.worker for gradient in lane.pushes} == {"worker-3"}
    assert [gradient.examples for gradient in lane.pushes] == [4, 4, 4]


def test_weights_are_pulled_once_a_lease_then_come_with_the_receipts() -> None:
    lane = lane_of()
    worker = worker_of(lane)
    worker.work(LEASE, never)
    assert lane.calls == ["pull", "push and pull", "receipt", "push and pull", "receipt", "push", "receipt"]
    worker.work(LEASE, never)
    assert lane.calls[7] == "pull"
    assert [gradient.read.updates for gradient in lane.pushes] == [0, 1, 2, 3, 4, 5]


def test_a_gradient_is_that_of_the_weights_it_says_it_read() -> None:
    lane = lane_of()
    lane.weights = np.random.default_rng(3).standard_normal(SIZE, dtype=np.float32)
    worker_of(lane).work(LEASE, never)
    for gradient, weights in zip(lane.pushes, lane.weights_read, strict=True):
        expected = np.empty(SIZE, np.float32)
        loss = worker_of().gradient(gradient.batch, weights, expected)
        np.testing.assert_array_equal(gradient.values, expected)
        assert gradient.loss == loss


def test_a_short_last_batch_says_how_many_examples_it_has() -> None:
    lane = lane_of()
    worker_of(lane).work(Lease(0, (BatchRange(0, 2, 3),)), never)
    assert lane.pushes[0].examples == 3
    assert lane.calls == ["pull", "push", "receipt"]


def test_two_partitions_get_their_slices_and_all_pushes_precede_the_first_receipt() -> None:
    whole = lane_of()
    first = lane_of(5)
    second = lane_of(SIZE - 5)
    calls: list[str] = []
    first.calls = second.calls = calls
    second.at = Version(4, 90)
    worker_of(whole).work(LEASE, never)
    worker_of(first, second).work(LEASE, never)
    assert calls[:6] == ["pull", "pull", "push and pull", "push and pull", "receipt", "receipt"]
    for one, left, right in zip(whole.pushes, first.pushes, second.pushes, strict=True):
        np.testing.assert_array_equal(np.concatenate([left.values, right.values]), one.values)
        assert one.norm == left.norm == right.norm
    assert [gradient.read for gradient in second.pushes] == [Version(4, 90), Version(4, 91), Version(4, 92)]


def test_it_stops_between_batches_when_asked() -> None:
    lane = lane_of()
    assert worker_of(lane).work(LEASE, lambda: len(lane.pushes) == 1) == LeaseEnd(7, stopped=True)
    assert [gradient.batch for gradient in lane.pushes] == BATCHES[:1]
    assert lane.calls[-1] == "receipt"


def test_asked_before_the_first_batch_it_does_not_even_pull() -> None:
    lane = lane_of()
    assert worker_of(lane).work(LEASE, lambda: True) == LeaseEnd(7, stopped=True)
    assert lane.calls == []


def test_a_receipt_may_take_twice_as_long_as_an_answer() -> None:
    lane = lane_of()
    worker_of(lane, timeout_s=3.0).work(LEASE, never)
    assert lane.limits == [3, 6, 6, 6]


@pytest.mark.parametrize("wrong", [{"worker": "worker-4"}, {"batch": BatchId(2, 0, 4)}])
def test_a_receipt_for_something_else_is_an_error(wrong: dict[str, Any]) -> None:
    lane = lane_of()
    lane.spoil = lambda receipt: receipt._replace(**wrong)
    with pytest.raises(FrameError, match=r"worker-3 pushed .* but got the receipt of"):
        worker_of(lane).work(LEASE, never)


def test_a_server_that_does_not_answer_ends_the_lease() -> None:
    def silent(receipt: Receipt) -> Receipt:
        raise LaneTimeoutError("no receipt within 60 s")

    lane = lane_of()
    lane.spoil = silent
    worker = worker_of(lane)
    with pytest.raises(LaneTimeoutError):
        worker.work(LEASE, never)
    assert lane.calls[-1] == "close"
    lane.spoil = lambda receipt: receipt
    assert worker.work(LEASE, never) == LeaseEnd(7, stopped=False)
    assert len(lane.segments) == 2  # memory that a server may still read is not reused


def test_only_the_lane_to_the_server_that_is_gone_is_hung_up() -> None:
    first = lane_of(5)
    second = lane_of(SIZE - 5)
    worker = worker_of(first, second)
    worker.hang_up(1)  # there is no connection yet
    worker.connect()
    worker.hang_up(1)
    assert (first.calls, second.calls) == ([], ["hang up"])


def test_a_second_lease_goes_by_the_lanes_of_the_first() -> None:
    lane = lane_of()
    worker = worker_of(lane)
    for _ in range(2):
        worker.work(LEASE, never)
    assert len(lane.segments) == 1
    assert worker.lane_kinds == ("ray",)


def test_a_server_that_cannot_be_reached_leaves_no_lane_open() -> None:
    def connect(segment: Segment) -> FakeLane:
        raise ServerGoneError("no server listens there")

    reached = lane_of(5)
    first = slice(0, 5)
    second = slice(5, SIZE)
    routes = [Route(first, partial(reached.connect, part=first)), Route(second, connect)]
    worker = Worker("worker-3", MODEL, LAYOUT, TRAIN, SHARDS, 1, PLAIN, routes)
    with pytest.raises(ServerGoneError, match="no server listens"):
        worker.work(LEASE, never)
    assert reached.calls == ["close"]


@pytest.mark.parametrize("pipeline", [1, 2])
def test_a_pipeline_computes_ahead_while_so_many_pushes_are_under_way(pipeline: int) -> None:
    lane = lane_of()
    lease = Lease(0, (BatchRange(0, 0, 6),))
    worker_of(lane, pipeline=pipeline).work(lease, never)
    under_way = 0
    most = 0
    for call in lane.calls:
        under_way += {"push": 1, "push and pull": 1, "receipt": -1}.get(call, 0)
        most = max(most, under_way)
    assert most == pipeline + 1
    assert under_way == 0
    assert lane.calls.count("pull") == pipeline + 1
    # The weights of a batch come with the receipt of the previous push in the same slot.
    assert [gradient.read.updates for gradient in lane.pushes] == [*[0] * (pipeline + 1), *range(1, 6 - pipeline)]
    for gradient, weights in zip(lane.pushes, lane.weights_read, strict=True):
        expected = np.empty(SIZE, np.float32)
        worker_of().gradient(gradient.batch, weights, expected)
        np.testing.assert_array_equal(gradient.values, expected)


@pytest.mark.parametrize("pipeline", [0, 2])
def test_nothing_is_kept_of_pushes_that_are_answered(pipeline: int) -> None:
    lane = lane_of()
    worker = worker_of(lane, pipeline=pipeline)
    worker.work(LEASE, never)
    assert [pending() for pending in lane.pendings] == [None] * 3


def test_a_stopped_pipeline_waits_for_what_is_under_way() -> None:
    lane = lane_of()
    end = worker_of(lane, pipeline=2).work(Lease(0, (BatchRange(0, 0, 6),)), lambda: len(lane.pushes) == 2)
    assert end.stopped
    assert len(lane.pushes) == lane.calls.count("receipt") == 2


def test_the_models_own_error_names_the_batch_and_the_cause() -> None:
    with pytest.raises(WorkerError, match=r"epoch=2, shard=0, index=1.*ZeroDivisionError: by hand"):
        stub_pushes(Stub(error=ZeroDivisionError("by hand")))


def test_the_models_own_error_on_validation_is_told_apart() -> None:
    stub = Stub()
    layout = Layout.of(stub.initial_weights(0), stub.buffers)
    with pytest.raises(WorkerError, match="validation: RuntimeError: no outputs"):
        worker_of(model=stub, layout=layout).evaluate(np.zeros(6, np.float32), TRAIN)


def test_an_evaluation_is_the_models_loss_and_accuracy() -> None:
    evaluation = worker_of().evaluate(np.zeros(SIZE, np.float32), TRAIN)
    assert evaluation.loss == pytest.approx(np.log(2))
    assert evaluation.accuracy == 0.5
    assert evaluation.examples == 22


def test_the_norm_is_that_of_the_trained_tensors_alone() -> None:
    for gradient in stub_pushes(Stub(gradient=3.0, buffer=100.0)):
        assert gradient.norm == pytest.approx(6.0)
        assert gradient.loss == 0.5
        assert gradient.compute_s >= 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_a_gradient_that_is_not_finite_has_a_norm_that_is_not(value: float) -> None:
    assert not any(np.isfinite(gradient.norm) for gradient in stub_pushes(Stub(gradient=value)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nor_is_that_of_a_buffer_that_is_not_finite(value: float) -> None:
    assert not any(np.isfinite(gradient.norm) for gradient in stub_pushes(Stub(buffer=value)))


def test_random_layers_are_seeded_by_the_batch_and_the_job() -> None:
    first = Stub()
    again = Stub()
    for stub in (first, again):
        stub_pushes(stub)
    assert first.seeds == again.seeds
    assert len(set(first.seeds)) == len(BATCHES)
    other = Worker("w", first, Layout.of(first.initial_weights(0), first.buffers), TRAIN, SHARDS, seed=2)
    other.gradient(BATCHES[0], np.zeros(6, np.float32), np.zeros(6, np.float32))
    assert first.seeds[-1] != first.seeds[0]


def test_a_gradient_is_a_function_of_its_arguments_alone() -> None:
    weights = np.random.default_rng(3).standard_normal(SIZE, dtype=np.float32)
    outs = [np.full(SIZE, fill, np.float32) for fill in (0, 7)]
    worker = worker_of()
    worker.gradient(BatchId(5, 1, 1), weights, np.empty(SIZE, np.float32))
    losses = [worker.gradient(BatchId(0, 1, 2), weights, out) for out in outs]
    assert losses[0] == losses[1]
    np.testing.assert_array_equal(outs[0], outs[1])


# Options: local steps, compression, stale gradients


def dense(values: FloatArray | Encoded, size: int) -> FloatArray:
    assert isinstance(values, Encoded)
    out = np.empty(size, np.float32)
    decode(values, out)
    return out


def test_local_steps_push_the_way_back_from_where_they_end() -> None:
    shards = Shards(len(TRAIN), num_shards=2, batch_size=4, seed=1, shuffle=True, steps=2)
    worker = worker_of(shards=shards, worker_options=WorkerOptions(local=LocalSteps(steps=2, lr=0.5)))
    batch = BatchId(0, 1, 0)
    weights = np.random.default_rng(3).standard_normal(SIZE, dtype=np.float32)
    out = np.empty(SIZE, np.float32)
    local = weights.copy()
    losses = []
    loss = worker.gradient(batch, weights, out)
    for index in range(2):
        gradient = np.empty(SIZE, np.float32)
        losses.append(worker_of().gradient(BatchId(0, 1, index), local, gradient))
        local -= np.float32(0.5) * gradient
    np.testing.assert_array_equal(out, weights - local)
    assert loss == pytest.approx(np.mean(losses), rel=1e-6)


def test_a_push_of_local_steps_may_be_short_at_a_shards_end() -> None:
    shards = Shards(len(TRAIN), num_shards=2, batch_size=4, seed=1, shuffle=True, steps=2)
    assert shards.grid.batches_per_shard == (2, 2)
    assert [len(rows) for rows in shards.mini_batches(BatchId(0, 0, 1))] == [3]
    lane = lane_of()
    worker_of(lane, shards=shards, worker_options=WorkerOptions(local=LocalSteps(steps=2, lr=0.5))).work(
        Lease(0, (BatchRange(0, 0, 2),)), never
    )
    assert [gradient.examples for gradient in lane.pushes] == [8, 3]


def test_a_buffer_moves_by_all_local_steps_together() -> None:
    stub = Stub(gradient=2.0, buffer=0.25)
    layout = Layout.of(stub.initial_weights(0), stub.buffers)
    shards = Shards(len(TRAIN), num_shards=1, batch_size=4, seed=1, shuffle=True, steps=3)
    worker = worker_of(
        model=stub, layout=layout, shards=shards, worker_options=WorkerOptions(local=LocalSteps(steps=3, lr=0.1))
    )
    out = np.empty(6, np.float32)
    worker.gradient(BatchId(0, 0, 0), np.zeros(6, np.float32), out)
    np.testing.assert_allclose(out, [0.6] * 4 + [0.75] * 2, rtol=1e-6)
    assert len(set(stub.seeds)) == 3


def test_what_compression_leaves_out_goes_with_the_next_push() -> None:
    lane = lane_of()
    plain = lane_of()
    worker = worker_of(lane, worker_options=WorkerOptions(compression=TopKCompression(name="top_k", ratio=0.25)))
    end = worker.work(LEASE, never)
    worker_of(plain).work(LEASE, never)
    sent = np.zeros(SIZE, np.float32)
    whole = np.zeros(SIZE, np.float32)
    for compressed, gradient in zip(lane.pushes, plain.pushes, strict=True):
        assert not isinstance(gradient.values, Encoded)
        sent += dense(compressed.values, SIZE)
        whole += gradient.values  # the same gradients: the fake server's weights do not depend on the pushed values
    assert np.linalg.norm(whole - sent) == pytest.approx(end.residual_norm, rel=1e-5)
    assert end.residual_norm > 0
    assert [gradient.norm for gradient in lane.pushes] == [gradient.norm for gradient in plain.pushes]


@pytest.mark.parametrize("outcome", [Outcome.DUPLICATE, Outcome.REQUEUED, Outcome.DISCARDED, Outcome.REJECTED])
def test_a_refused_push_leaves_the_error_memory_as_it_was(outcome: Outcome) -> None:
    lane = lane_of()
    worker = worker_of(lane, worker_options=WorkerOptions(compression=TopKCompression(name="top_k", ratio=0.25)))
    before = worker.work(LEASE, never).residual_norm
    lane.outcome = outcome
    assert worker.work(LEASE, never).residual_norm == before > 0


def test_a_push_in_doubt_leaves_the_error_memory_usable() -> None:
    lane = lane_of()
    worker = worker_of(lane, worker_options=WorkerOptions(compression=TopKCompression(name="top_k", ratio=0.25)))

    def fail(receipt: Receipt) -> Receipt:
        raise LaneTimeoutError("scripted")

    lane.spoil = fail
    with pytest.raises(LaneTimeoutError):
        worker.work(LEASE, never)
    lane.spoil = lambda receipt: receipt
    assert worker.work(LEASE, never).residual_norm > 0


def test_buffers_travel_beside_what_is_compressed() -> None:
    stub = Stub(gradient=2.0, buffer=0.25)
    layout = Layout.of(stub.initial_weights(0), stub.buffers)
    lane = lane_of(layout.num_parameters)
    worker_options = WorkerOptions(compression=TopKCompression(name="top_k", ratio=0.25))
    worker_of(lane, model=stub, layout=layout, worker_options=worker_options).work(LEASE, never)
    first = lane.pushes[0]
    np.testing.assert_array_equal(dense(first.values, 4), [2, 0, 0, 0])
    assert first.buffers is not None
    np.testing.assert_array_equal(first.buffers, [0.25, 0.25])


def test_the_weights_read_come_along_if_the_job_asks_for_them() -> None:
    lane = lane_of()
    worker_of(lane, worker_options=WorkerOptions(sends_weights=True)).work(LEASE, never)
    for gradient, weights in zip(lane.pushes, lane.weights_read, strict=True):
        assert gradient.weights_read is not None
        np.testing.assert_array_equal(gradient.weights_read, weights)


def test_a_gradient_that_has_become_too_stale_is_not_pushed() -> None:
    lane = lane_of()
    lane.ahead = 3
    worker_of(lane, worker_options=WorkerOptions(stop_at=4)).work(LEASE, never)
    assert len(lane.pushes) == 3
    stale = lane_of()
    stale.ahead = 4
    worker_of(stale, worker_options=WorkerOptions(stop_at=4)).work(LEASE, never)
    assert stale.pushes == []
    assert stale.calls == ["pull", "version"] * 3  # each batch begins with the newest weights
