"""Equivalences with serial loops of stochastic gradient descent, bit for bit; and the conservation of staleness."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psgd.simulation.cluster import VirtualCluster
from psgd.simulation.problem import Problem
from psgd.spec import JobSpec
from psgd_workers.data.examples import Examples
from psgd_workers.data.shards import Shards
from psgd_workers.gradients.layout import Layout
from psgd_workers.messages import BatchId, EpochGrid, FloatArray
from psgd_workers.models.numpy.network import Network
from psgd_workers.worker import Worker
from tests.support.in_process import EachStep, InProcess
from tests.support.jobs import GRID, START, job, quadratic

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
        return len(self.shards.rows(batch))

    def gradient(self, batch: BatchId, weights: FloatArray) -> FloatArray:
        out = np.empty_like(weights)
        self.worker.gradient(batch, weights, out)
        return out

    def host(self, mode: str, workers: int, **options: Any) -> InProcess:
        plain = {"optimizer": {"lr": 0.1, "momentum": options.pop("momentum", 0.0)}, "run": {"epochs": EPOCHS}}
        sections = {name: options.pop(name) for name in JobSpec.model_fields if name in options}
        spec = job(mode, workers, **plain | sections)
        return InProcess(spec, self.grid, self.initial, self.worker.gradient, **options)


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
    weights = training.initial.copy()
    velocity = np.zeros_like(training.initial)
    for batch in [batch for epoch in epochs_of(training.grid) for batch in epoch]:
        velocity = np.float32(0.9) * velocity + training.gradient(batch, weights)
        weights -= LR * velocity
    np.testing.assert_array_equal(training.host("async", 1, momentum=0.9).run().weights, weights)


def mean(training: Training, batches: list[BatchId], weights: FloatArray) -> FloatArray:
    """Return Σ (nᵢ·N/Σn)·gᵢ / N over the batches in their order: the plain mean if all batches have one size."""
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


@pytest.mark.parametrize("servers", [2, 3])
@pytest.mark.parametrize(
    "sections",
    [
        {"optimizer": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "ema": 0.9}},
        {"optimizer": {"lr": 0.1, "name": "adagrad"}},
        {"optimizer": {"lr": 0.01, "name": "adam", "max_grad_norm": 0.3}},
        {"optimizer": {"lr": 0.01, "name": "adamw", "clip_value": 0.1}},
        {"optimizer": {"lr": 0.1, "name": "delayed_nesterov", "every": 3}},
        {"scaling": {"pipeline": 1}},
        {"consistency": {"mode": "bsp"}},
        {"consistency": {"mode": "softsync", "s": 1}},
        {"consistency": {"mode": "buffered", "k": 2}},
        {"consistency": {"mode": "ssp", "s": 1}},
        {"correction": {"name": "dc_asgd", "variant": "adaptive"}},
        {"correction": {"name": "gap_aware"}, "optimizer": {"lr": 0.1, "momentum": 0.9}},
        {"correction": {"name": "dana", "momentum": 0.9}},
        {"compression": {"name": "fp16"}},
    ],
    ids=lambda sections: "-".join(str(value) for section in sections.values() for value in section.values()),
)
def test_several_partitions_are_one(training: Training, sections: dict[str, Any], servers: int) -> None:
    """Check that partitions which take their pushes in the same order end with the weights of a single one."""
    one, several = (
        training.host("async", 3, **sections | {"scaling": scaling, "compute_s": uneven}).run()
        for scaling in (sections.get("scaling", {}), {"servers": servers} | sections.get("scaling", {}))
    )
    assert one.applied == several.applied
    np.testing.assert_array_equal(one.weights, several.weights)
    parts = [server.epoch_weights(EPOCHS) for server in several.servers.values()]
    np.testing.assert_array_equal(one.servers[0].epoch_weights(EPOCHS), np.concatenate(parts))


@pytest.mark.parametrize("compression", [{"name": "none"}, {"name": "int8"}], ids=lambda spec: str(spec["name"]))
def test_a_partition_may_be_of_buffers_alone(compression: dict[str, Any]) -> None:
    problem = Problem(GRID, START, quadratic, num_trainable=2)
    scaling = {"servers": 3, "pipeline": 1}
    several = VirtualCluster(job(workers=2, scaling=scaling, compression=compression), problem, uneven).run()
    assert [server.partition.num_trainable for server in several.servers.values()] == [2, 0, 0]
    one = VirtualCluster(job(workers=2, scaling={"pipeline": 1}, compression=compression), problem, uneven).run()
    np.testing.assert_array_equal(several.weights, one.weights)


def test_the_same_run_twice_is_the_same_to_the_bit(training: Training) -> None:
    first, second = (training.host("async", 4, compute_s=uneven).run() for _ in range(2))
    assert first.applied == second.applied
    np.testing.assert_array_equal(first.weights, second.weights)


@settings(max_examples=15)
@given(workers=st.integers(1, 6), seed=st.integers(0, 2**32))
def test_staleness_is_conserved(workers: int, seed: int) -> None:
    """Check Σ staleness applied + Σ staleness in flight = (n - 1)·updates, whenever all n workers compute."""
    sums = staleness_sums(workers, seed)
    assert all(total == (workers - 1) * updates for updates, _, (total,) in sums)
    assert {updates for updates, _, _ in sums} == set(range(1, 101))
    assert all(late >= early for (early, _, _), (late, _, _) in pairwise(sums))


@settings(max_examples=15)
@given(st.integers(1, 4), st.integers(0, 2**32), st.integers(1, 3), st.integers(0, 2))
def test_staleness_is_conserved_in_every_partition_and_with_batches_computed_ahead(
    workers: int, seed: int, servers: int, pipeline: int
) -> None:
    """Check that each step adds 1 for each gradient in flight: n·(pipeline + 1) once every slot holds weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("psgd.core.driver.workers.FIRST_LEASE", 110)  # else the slots would be empty at a lease's end
        sums = staleness_sums(workers, seed, {"servers": servers, "pipeline": pipeline})
    expected = 0
    for updates, stale, totals in sums:
        expected += stale
        assert totals == [expected] * servers, updates
    assert [updates for updates, _, _ in sums] == list(range(1, 101))
    assert {stale for _, stale, _ in sums[-50:]} == {workers * (pipeline + 1) - 1}


def staleness_sums(workers: int, seed: int, scaling: dict[str, int] | None = None) -> list[tuple[int, int, list[int]]]:
    """Return (updates, stale gradients in flight, Σ staleness of each partition) after each of the first 100 steps."""
    sums: list[tuple[int, int, list[int]]] = []

    def look(host: VirtualCluster) -> None:
        updates = host.servers[0].version.updates
        totals = []
        if updates > 100:
            host.stop()
            return
        for partition, server in host.servers.items():
            applied = sum(value * count for value, count in server.report().staleness.items())
            reads = [reads[partition].updates for reads in host.in_flight]
            totals.append(applied + sum(updates - read for read in reads))
        sums.append((updates, sum(reads[0].updates < updates for reads in host.in_flight), totals))

    def seconds(worker: str, batch: BatchId) -> float:
        return float(np.random.default_rng([seed, int(worker[-1]), *batch]).exponential(0.1))

    grid = EpochGrid((5000,), 5000)  # leases get short only near the end of an epoch
    weights = np.zeros(3, np.float32)
    InProcess(
        job("async", workers, scaling=scaling or {}), grid, weights, one, compute_s=seconds, observers=[EachStep(look)]
    ).run()
    return sums


def one(batch: BatchId, weights: FloatArray, out: FloatArray) -> float:
    out[:] = 1
    return 1.0
