"""The equivalences that make this stochastic gradient descent, bit for bit, and the conservation of staleness."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psgd.simulation.cluster import VirtualCluster
from psgd_workers.datasets.examples import Examples
from psgd_workers.layout import Layout
from psgd_workers.messages import BatchId, EpochGrid, FloatArray
from psgd_workers.models.network import Network
from psgd_workers.shards import Shards
from psgd_workers.worker import Worker
from tests.inprocess import InProcess
from tests.unit.core.jobs import job

LR = np.float32(0.1)
EPOCHS = 3
SEED = 5


class Training:
    """Softmax regression on random examples, in two shards whose last batches are short."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        features = random.standard_normal((53, 4), dtype=np.float32)
        examples = Examples(features, random.integers(0, 3, 53))
        model = Network((4, 3), "cross_entropy")
        tensors = model.initial_weights(SEED)
        layout = Layout.of(tensors)
        self.shards = Shards(len(examples), num_shards=2, batch_size=4, seed=SEED, shuffle=True)
        self.worker = Worker("serial", model, layout, examples, self.shards, SEED)
        self.initial = layout.pack(tensors)

    @property
    def grid(self) -> EpochGrid:
        return self.shards.grid

    def examples(self, batch: BatchId) -> int:
        return len(self.shards.examples(batch))

    def gradient(self, batch: BatchId, weights: FloatArray) -> FloatArray:
        out = np.empty_like(weights)
        self.worker.gradient(batch, weights, out)
        return out

    def host(self, mode: str, workers: int, **options: Any) -> InProcess:
        optimizer = {"lr": 0.1, "momentum": options.pop("momentum", 0.0)}
        spec = job(mode, workers, optimizer=optimizer, run=options.pop("run", {"epochs": EPOCHS}))
        return InProcess(spec, self.grid, self.initial, self.worker.gradient, examples=self.examples, **options)


@pytest.fixture(scope="module")
def training() -> Training:
    return Training()


def epochs_of(grid: EpochGrid) -> list[list[BatchId]]:
    return [[grid.batch(epoch, position) for position in range(grid.num_batches)] for epoch in range(EPOCHS)]


def uneven(worker: str, batch: BatchId) -> float:
    return float(0.01 + 0.2 * np.random.default_rng([int(worker[-1]), *batch]).random())


def test_async_with_one_worker_is_a_serial_loop(training: Training) -> None:
    weights = training.initial.copy()
    for batch in [batch for epoch in epochs_of(training.grid) for batch in epoch]:
        weights -= LR * training.gradient(batch, weights)
    np.testing.assert_array_equal(training.host("async", 1).run().weights, weights)
    assert not np.array_equal(weights, training.initial)


def test_async_with_one_worker_is_a_serial_loop_with_momentum(training: Training) -> None:
    weights, velocity = training.initial.copy(), np.zeros_like(training.initial)
    for batch in [batch for epoch in epochs_of(training.grid) for batch in epoch]:
        velocity = np.float32(0.9) * velocity + training.gradient(batch, weights)
        weights -= LR * velocity
    np.testing.assert_array_equal(training.host("async", 1, momentum=0.9).run().weights, weights)


def mean(training: Training, batches: list[BatchId], weights: FloatArray) -> FloatArray:
    """Σ (nᵢ·N/Σn)·gᵢ / N over the batches in their order: the plain mean, where all are of one size."""
    examples = [training.examples(batch) for batch in batches]
    total = np.zeros_like(weights)
    for batch, number in zip(batches, examples, strict=True):
        total += training.gradient(batch, weights) * np.float32(number * len(batches) / sum(examples))
    return total / np.float32(len(batches))


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_bsp_is_a_loop_of_steps_on_the_mean_of_n_gradients(training: Training, workers: int) -> None:
    weights = training.initial.copy()
    for epoch in epochs_of(training.grid):
        for start in range(0, len(epoch), workers):
            weights -= LR * mean(training, epoch[start : start + workers], weights)
    host = training.host("bsp", workers, compute_s=uneven).run()
    np.testing.assert_array_equal(host.weights, weights)


def test_bsp_with_one_worker_is_async_with_one(training: Training) -> None:
    bsp, asynchronous = (training.host(mode, 1, momentum=0.9).run() for mode in ("bsp", "async"))
    np.testing.assert_array_equal(bsp.weights, asynchronous.weights)


def test_two_partitions_are_one(training: Training) -> None:
    one, two = (training.host("async", 3, momentum=0.9, partitions=p, compute_s=uneven).run() for p in (1, 2))
    assert one.applied == two.applied
    np.testing.assert_array_equal(one.weights, two.weights)


def test_the_same_run_twice_is_the_same_to_the_bit(training: Training) -> None:
    first, second = (training.host("async", 4, compute_s=uneven).run() for _ in range(2))
    assert first.applied == second.applied
    np.testing.assert_array_equal(first.weights, second.weights)


@settings(max_examples=15, deadline=None)
@given(workers=st.integers(1, 6), seed=st.integers(0, 2**32))
def test_staleness_is_conserved(workers: int, seed: int) -> None:
    """Σ staleness applied + Σ staleness in flight = (n - 1)·updates, at every instant at which all n compute."""
    sums: list[tuple[int, int]] = []

    def observe(host: VirtualCluster) -> None:
        server = host.servers[0]
        if server.version.updates <= 100:  # towards the end leases shrink, and a worker may wait for one
            applied = sum(value * count for value, count in server.report().staleness.items())
            in_flight = sum(server.version.updates - read.updates for read in host.computing.values())
            sums.append((server.version.updates, applied + in_flight))

    def seconds(worker: str, batch: BatchId) -> float:
        return float(np.random.default_rng([seed, int(worker[-1]), *batch]).exponential(0.1))

    spec, weights = job("async", workers, run={"max_updates": 500}), np.zeros(3, np.float32)
    InProcess(spec, EpochGrid((600,), 600), weights, one, compute_s=seconds, observe=observe).run()
    assert all(total == (workers - 1) * updates for updates, total in sums)
    assert {updates for updates, _ in sums} == set(range(1, 101))
    assert all(late >= early for (early, _), (late, _) in pairwise(sums))


def one(batch: BatchId, weights: FloatArray, out: FloatArray) -> float:
    out[:] = 1
    return 1.0
