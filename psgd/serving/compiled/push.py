"""One push in compiled code: admission, step, publication, counters and journal."""

from __future__ import annotations

from math import isfinite
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from psgd.core.server.applied import EPOCHS, MISSING, ROWS
from psgd.core.server.journal import CAPACITY, OUTCOMES, RECORD, RecordKind
from psgd.core.server.live_worker import BATCHES, CLOCK, LAST_PUSH_AT, LIVE, MEAN_S, PUSHES, TOTAL_S
from psgd.core.server.push_arrays import FORK, INCARNATION, UPDATES, PushArrays
from psgd.core.server.push_check import LONGEST_S as MAX_COMPUTE_S
from psgd.core.server.tally import (
    BYTES,
    COUNTED,
    FIRST_AT,
    FIRST_SAMPLES,
    FIRST_UPDATES,
    JITTER_S,
    LONGEST_S,
    LOSS_EPOCHS,
    MAX_STALENESS,
    SAMPLES,
    STEPPED_AT,
)
from psgd.serving.compiled.native import compiled, fence
from psgd.serving.compiled.rule import DELAY_ADAPTIVE, RESCALED, STALENESS_LR, Grid, Rule
from psgd.serving.compiled.step import all_finite, learning_rate, make_step
from psgd_workers.messages import FloatArray, Outcome

__all__ = ["APPLIED", "HEADER", "Header", "ServerArrays", "WorkerArrays", "apply_push"]

HEADER = np.dtype(  # a frame's header; see `psgd_workers.transport.frames`
    [
        ("magic", "<u4"),
        ("format", "u1"),
        ("kind", "u1"),
        ("slot", "u1"),
        ("code", "u1"),
        ("incarnation", "<u4"),
        ("examples", "<u4"),
        ("payload", "<u8"),
        ("epoch", "<u4"),
        ("shard", "<u4"),
        ("index", "<u4"),
        ("read_incarnation", "<u4"),
        ("read_updates", "<u8"),
        ("loss", "<f8"),
        ("norm", "<f8"),
        ("compute_s", "<f8"),
        ("number", "<u8"),
        ("carries", "<u8"),
        ("wants", "<u2"),
        ("processor", "<u2"),
        ("checksum", "<u4"),
    ]
)
Header = NDArray[np.void]

APPLIED = OUTCOMES[Outcome.APPLIED]
PUSH = int(RecordKind.PUSH)
SEQUENCE = 0  # index of `PushArrays.sequence`; the version follows
NAME = int(RECORD.fields["worker"][1]) if RECORD.fields else 0  # offset of the worker's name in a record
OTHERS = RECORD.itemsize  # offset of the versions of the other partitions


class ServerArrays(NamedTuple):
    """The arrays of a server that compiled code uses."""

    rule: Rule  # [1], RULE
    grid: Grid  # [shards, 4]; see `epoch_grid`
    state: PushArrays
    records: NDArray[np.void]  # [records, 2], RECORD: the fields that every run has, twice, as views of `state.journal`
    scratch: FloatArray  # [BLOCK]
    mutex: NDArray[np.uint8]  # pthread_mutex_t of the server's lock
    fault: NDArray[np.int64]  # [1]: 1 after a call of the server has failed, else 0


class WorkerArrays(NamedTuple):
    """The arrays of a worker that compiled code uses; see `psgd.core.server.live_worker`."""

    name: NDArray[np.uint8]  # [16], padded with zeros
    counts: NDArray[np.int64]
    times: NDArray[np.float64]


@compiled
def apply_push(
    server: ServerArrays,
    worker: WorkerArrays,
    header: Any,
    values: FloatArray,
    others: NDArray[np.uint8],
    now: float,
    weights: FloatArray,
) -> bool:
    """Apply a push of the usual case. The caller holds the server's lock.

    Args:
        server: arrays of the server.
        worker: arrays of the worker that pushes.
        header: fields of the frame.
        values: `[partition size]`, its gradient.
        others: versions of the other partitions, as in the frame.
        now: time of the server's clock, seconds.
        weights: `[partition size]`, overwritten with the weights after the step; `[0]`: they are not wanted.

    Returns:
        False if this is no usual case: nothing was changed, and `ParameterServer.push` has to decide.
    """
    rule = server.rule[0]
    state = server.state
    row = header.epoch % ROWS
    if not (_is_usual(server, worker, header) and all_finite(values)):
        return False
    position = server.grid[header.shard, 0] + header.index
    staleness = state.version[UPDATES] - np.int64(header.read_updates)
    compute_s = _count_arrival(state, worker, header.compute_s, 4 * len(values), now)
    rate = learning_rate(rule, state.counts[COUNTED]) * _factor(rule, state, worker, staleness, compute_s)
    scale = min(1.0, rule.max_norm / (header.norm + 1e-6))
    state.settled[row, position] = True
    state.progress[MISSING + row] -= 1
    _count_loss(state, header, compute_s)
    state.sequence[SEQUENCE] += 1
    fence()
    make_step(rule, state, values, server.scratch, rate, scale, weights)
    fence()
    state.version[UPDATES] += 1
    state.sequence[SEQUENCE + 1] = state.version[INCARNATION]
    state.sequence[SEQUENCE + 2] = state.version[UPDATES]
    fence()
    state.sequence[SEQUENCE] += 1
    _count_step(state, header.examples, staleness, now)
    worker.counts[CLOCK] += 1
    _record(server, worker, header, others, compute_s, now)
    return True


@compiled
def _is_usual(server: ServerArrays, worker: WorkerArrays, header: Any) -> bool:
    """Return True if `ParameterServer.push` would make a step, end or begin no epoch, and hold no receipt back.

    Every index that later code uses is checked here.
    """
    rule = server.rule[0]
    state = server.state
    if not rule.applies or server.fault[0] or not worker.counts[LIVE]:
        return False
    if rule.correction == RESCALED and not worker.counts[BATCHES]:
        return False
    ahead = header.epoch - state.progress[EPOCHS]
    # Fields of a frame have no sign, but other callers' numbers have.
    if not 0 <= ahead < ROWS or not 0 <= header.shard < len(server.grid) or header.slot < 0:
        return False
    first, batches, size, examples = server.grid[header.shard]
    if not 0 <= header.index < batches or header.examples != min(size, examples - header.index * size):
        return False
    row = header.epoch % ROWS
    missing = state.progress[MISSING + row]
    if state.settled[row, first + header.index] or missing == 1 or missing == state.settled.shape[1]:
        return False
    if not (isfinite(header.loss) and 0 <= header.norm < np.inf and 0 <= header.compute_s < MAX_COMPUTE_S):
        return False
    if not 0 <= np.int64(header.carries) < np.int64(header.number):
        return False
    updates = state.version[UPDATES]
    read = np.int64(header.read_updates)
    if header.read_incarnation != state.version[INCARNATION] or not state.version[FORK] <= read <= updates:
        return False
    return updates - read < min(rule.stale, MAX_STALENESS) and state.filled[0] < CAPACITY


@compiled
def _count_arrival(state: PushArrays, worker: WorkerArrays, compute_s: float, size: int, now: float) -> float:
    """Count the push and its bytes. Return its computing time, limited to what the server's clock allows."""
    state.counts[BYTES] += size
    allowed_s = now - worker.times[LAST_PUSH_AT] + JITTER_S
    worker.times[LAST_PUSH_AT] = now
    worker.counts[PUSHES] += 1
    return min(compute_s, allowed_s)


@compiled
def _factor(rule: Any, state: PushArrays, worker: WorkerArrays, staleness: int, compute_s: float) -> float:
    """Return the factor of the rate; see `psgd.core.server.corrections`."""
    if rule.correction == STALENESS_LR:
        return 1 / max(1, staleness)
    if rule.correction == DELAY_ADAPTIVE:
        return rule.workers / max(rule.workers, staleness)
    if rule.correction != RESCALED:
        return 1.0
    before = worker.times[MEAN_S]
    worker.counts[BATCHES] += 1
    worker.times[TOTAL_S] += np.float32(compute_s)
    after = worker.times[TOTAL_S] / worker.counts[BATCHES]
    worker.times[MEAN_S] = after
    state.means[0] += after - before
    mean = state.means[0] / state.means[1]
    return after / mean if mean > 0 else 1.0


@compiled
def _count_loss(state: PushArrays, header: Any, compute_s: float) -> None:
    state.times[LONGEST_S] = max(state.times[LONGEST_S], compute_s)
    row = header.epoch % LOSS_EPOCHS
    if state.loss_epochs[row, 0] != header.epoch:
        state.loss_epochs[row, 0] = header.epoch
        state.loss_epochs[row, 1] = 0
        state.losses[row] = 0.0
    state.losses[row] += header.loss * header.examples
    state.loss_epochs[row, 1] += header.examples


@compiled
def _count_step(state: PushArrays, examples: int, staleness: int, now: float) -> None:
    state.staleness[staleness] += 1
    state.counts[SAMPLES] += examples
    state.counts[COUNTED] += examples
    state.outcomes[APPLIED] += 1
    state.times[STEPPED_AT] = now
    if np.isnan(state.times[FIRST_AT]):
        state.times[FIRST_AT] = now
        state.counts[FIRST_UPDATES] = state.version[UPDATES]
        state.counts[FIRST_SAMPLES] = state.counts[SAMPLES]


@compiled
def _record(
    server: ServerArrays,
    worker: WorkerArrays,
    header: Any,
    others: NDArray[np.uint8],
    compute_s: float,
    now: float,
) -> None:
    """Append a record to the journal; see `psgd.core.server.journal`."""
    state = server.state
    place = state.filled[0]
    record = server.records[place, 0]
    record.kind = PUSH
    record.outcome = APPLIED
    record.slot = header.slot
    record.number = header.number
    record.carries = header.carries
    record.now = now
    record.epoch = header.epoch
    record.shard = header.shard
    record.index = header.index
    record.examples = header.examples
    record.read_incarnation = header.read_incarnation
    record.read_updates = header.read_updates
    record.incarnation = state.version[INCARNATION]
    record.updates = state.version[UPDATES]
    record.loss = header.loss
    record.compute_s = compute_s
    line = state.journal[place]
    for i in range(len(worker.name)):
        line[NAME + i] = worker.name[i]
    for i in range(len(others)):
        line[OTHERS + i] = others[i]
    state.filled[0] = place + 1
