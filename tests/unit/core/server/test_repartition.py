from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.partitions import partition_weights
from psgd.core.server.repartition import disagreement, repartition
from psgd.core.server.state import ServerState
from psgd.errors import ResumeError
from psgd.spec import JobSpec
from psgd_workers.messages import Outcome, Version
from tests.support.in_process import InProcess, VirtualCheckpoint
from tests.support.jobs import GRID, job, push, quadratic

START = np.linspace(-1, 1, 103, dtype=np.float32)
SIZE = GRID.num_batches
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.1},
    "momentum": {"lr": 0.1, "momentum": 0.9, "ema": 0.9},
    "adam": {"name": "adam", "lr": 0.1},
    "adagrad": {"name": "adagrad", "lr": 0.1},
    "delayed": {"name": "delayed_nesterov", "lr": 0.1, "every": 4},
}


def run(spec: JobSpec, resume: VirtualCheckpoint | None = None) -> InProcess:
    return InProcess(spec, GRID, START, quadratic, resume=resume).run()


def spec(servers: int, optimizer: dict[str, Any], mode: str = "async", workers: int = 1, **sections: Any) -> JobSpec:
    return job(mode, workers, optimizer=optimizer, scaling={"servers": servers}, **sections)


@pytest.mark.parametrize("servers", [(2, 3, 1), (1, 4, 2), (3, 2, 3)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_run_of_one_worker_ends_bit_for_bit_as_undisturbed(
    servers: tuple[int, ...], optimizer: dict[str, Any]
) -> None:
    whole = run(spec(1, optimizer, run={"max_updates": 3 * 7}))
    resume = None
    for part, count in enumerate(servers, 1):
        host = run(spec(count, optimizer, run={"max_updates": part * 7}), resume)
        assert host.status.updates == part * 7
        resume = host.checkpoint
    np.testing.assert_array_equal(host.weights, whole.weights)


@pytest.mark.parametrize(
    "correction", [{"name": "gap_aware"}, {"name": "dc_asgd", "variant": "adaptive"}], ids=lambda c: str(c["name"])
)
def test_what_a_correction_remembers_moves_too(correction: dict[str, Any]) -> None:
    whole = run(spec(1, {"lr": 0.1}, run={"max_updates": 20}, correction=correction))
    first = run(spec(2, {"lr": 0.1}, run={"max_updates": 10}, correction=correction))
    second = run(spec(3, {"lr": 0.1}, run={"max_updates": 20}, correction=correction), first.checkpoint)
    np.testing.assert_array_equal(second.weights, whole.weights)


def test_bsp_ends_bit_for_bit_as_undisturbed() -> None:
    whole = run(spec(1, {"lr": 0.1}, "bsp", 3, run={"epochs": 2}))
    first = run(spec(2, {"lr": 0.1}, "bsp", 3, run={"epochs": 1}))
    second = run(spec(3, {"lr": 0.1}, "bsp", 3, run={"epochs": 2}), first.checkpoint)
    np.testing.assert_array_equal(second.weights, whole.weights)


def test_many_workers_apply_every_batch_once() -> None:
    first = run(spec(3, {"lr": 0.1}, workers=4, run={"epochs": 1}))
    second = run(spec(2, {"lr": 0.1}, workers=4, run={"epochs": 3}), first.checkpoint)
    counts = second.status.ledger
    assert (counts.batches, counts.applied) == (3 * SIZE, 3 * SIZE)
    assert second.status.epochs == 3


def states(servers: int, num_trainable: int = 80, updates: int = 5, buffered: int = 0) -> tuple[ServerState, ...]:
    """Return the states of servers that took the same pushes in the same order."""
    partitions = partition_weights(len(START), num_trainable, servers)
    # With s = 1 a step takes as many gradients as there are workers.
    section = {"mode": "softsync", "s": 1} if buffered else {"mode": "async"}
    made = job(optimizer=OPTIMIZERS["momentum"], scaling={"servers": servers}, consistency=section)
    found = []
    for partition in partitions:
        server = ParameterServer(made, partition, START[partition.start : partition.stop], GRID, Version(1, 0))
        for worker in range(buffered + 1):
            server.join(f"worker-{worker}", 0.0)
        for position in range(updates * (buffered + 1) + buffered):
            batch = GRID.batch(0, position)
            whole = np.empty_like(START)
            quadratic(batch, START, whole)
            values = whole[partition.start : partition.stop].copy()
            gradient = push(batch, server.version, values=values)
            server.push(gradient._replace(others=(server.version,) * (servers - 1)), 0.0)
        found.append(server.state())
    return tuple(found)


@pytest.mark.parametrize("before", [1, 2, 5])
@pytest.mark.parametrize("after", [1, 3, 7])
def test_every_value_moves_with_what_belongs_to_it_buffers_too(before: int, after: int) -> None:
    old = states(before)
    new = states(after)
    assert disagreement(old) is None
    for partition, there in zip(partition_weights(len(START), 80, after), new, strict=True):
        made = repartition(old, partition)
        assert made.arrays.keys() == there.arrays.keys()
        for name, array in there.arrays.items():
            np.testing.assert_array_equal(made.arrays[name], array)
        differ = {name for name, value in there.metadata.items() if made.metadata[name] != value}
        assert differ <= {"history", "bytes"}
        assert made.metadata["history"] == []


def test_an_open_sum_moves_if_its_members_are_the_same() -> None:
    old = states(2, updates=2, buffered=1)
    assert disagreement(old) is None
    (there,) = states(1, updates=2, buffered=1)
    made = repartition(old, partition_weights(len(START), 80, 1)[0])
    assert made.metadata["aggregator"] == there.metadata["aggregator"] != {}
    np.testing.assert_array_equal(made.arrays["aggregator.sum"], there.arrays["aggregator.sum"])


def test_nothing_read_of_the_partitions_before_is_admitted() -> None:
    (partition,) = partition_weights(len(START), 80, 1)
    made = repartition(states(2), partition)
    server = ParameterServer.restore(job(optimizer=OPTIMIZERS["momentum"]), GRID, made, 2, 0.0)
    batch = GRID.batch(0, 8)
    (receipt,) = server.push(push(batch, Version(1, 5), values=START), 0.0)
    assert receipt.outcome is Outcome.REQUEUED
    (receipt,) = server.push(push(batch, Version(2, 5), values=START), 0.0)
    assert receipt.outcome is Outcome.APPLIED


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"version": [1, 4]}, "made 5 and 4 updates"),
        ({"epochs": 1}, "do not contain the same batches"),
        ({"counted": 3}, "differ in 'counted'"),
        ({"pushes": {"applied": 4}}, "count their pushes differently"),
    ],
)
def test_partitions_that_disagree_are_told(change: dict[str, Any], told: str) -> None:
    one, other = states(2)
    assert disagreement([one, ServerState(other.arrays, {**other.metadata, **change})]) == f"partitions 0 and 1 {told}"


def test_arrays_that_disagree_are_told() -> None:
    one, other = states(2)
    settled = other.arrays["settled.0"].copy()
    settled[0] ^= True
    told = disagreement([one, replace(other, arrays={**other.arrays, "settled.0": settled})])
    assert told == "partitions 0 and 1 do not contain the same batches"
    without = {name: array for name, array in other.arrays.items() if name != "optimizer.velocity"}
    told = disagreement([one, replace(other, arrays=without)])
    assert told == "partitions 0 and 1 differ in what they hold: optimizer.velocity"


def test_steps_that_disagree_are_told() -> None:
    host = run(spec(2, OPTIMIZERS["adam"], run={"max_updates": 3}))
    assert host.checkpoint is not None
    one, other = host.checkpoint.states
    arrays = {**other.arrays, "optimizer.steps": np.array([9])}
    assert disagreement([one, replace(other, arrays=arrays)]) == "partitions 0 and 1 differ in optimizer.steps"


def test_a_virtual_cluster_refuses_what_is_not_aligned() -> None:
    host = run(spec(2, {"lr": 0.1}, run={"max_updates": 3}))
    assert host.checkpoint is not None
    one, other = host.checkpoint.states
    torn = host.checkpoint._replace(states=(one, replace(other, metadata={**other.metadata, "version": [1, 2]})))
    with pytest.raises(ResumeError, match="of 2 servers cannot be cut for 3: partitions 0 and 1 made 3 and 2 updates"):
        run(spec(3, {"lr": 0.1}), torn)


def test_a_slice_of_one_trained_value_is_told_from_a_count() -> None:
    weights = np.ones(4, np.float32)
    problem = [InProcess(spec(n, OPTIMIZERS["adam"], run={"max_updates": 3}), GRID, weights, quadratic) for n in (1, 4)]
    one, four = (host.run() for host in problem)
    assert four.checkpoint is not None
    assert one.checkpoint is not None
    (partition,) = partition_weights(4, 4, 1)
    made = repartition(four.checkpoint.states, partition)
    for name, array in one.checkpoint.states[0].arrays.items():
        np.testing.assert_array_equal(made.arrays[name], array)
