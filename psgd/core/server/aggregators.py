"""Aggregators: each turns the gradients of a round into their mean. They differ in the vectors that they must keep.

A gradient comes with a `scale`, the factor of its trained values (from clipping), and a `weight` in the mean. The mean
is Σ wᵢ·gᵢ / Σ wᵢ. The mean weight Σ wᵢ / n then scales the rate of the step, so that a step of SGD is η·(1/n)·Σ wᵢ·gᵢ
as in the papers. It scales the rate and not the gradient because Adam and Adagrad ignore the length of a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from psgd.core.server.state import VectorCounts
from psgd_workers.messages import BatchId, FloatArray

__all__ = [
    "Aggregator",
    "Contribution",
    "OneGradient",
    "RingleaderTables",
    "RoundMean",
    "RunningMean",
    "Step",
    "StepMember",
    "TableMean",
]


class StepMember(NamedTuple):
    """The numbers of one gradient in a step, from which staleness and examples are counted."""

    updates_read: int  # number of updates in the version that the gradient was computed from
    examples: int


class Step(NamedTuple):
    """The gradient of one optimizer step."""

    gradient: FloatArray  # [partition size], not to be modified: memory of the aggregator or of the sender
    weight: float  # mean weight of the gradients in the step
    members: list[StepMember]  # the gradients that are in a step for the first time


class Contribution(NamedTuple):
    """One gradient that enters a round."""

    worker: str
    batch: BatchId
    member: StepMember
    values: FloatArray  # [partition size]; its owner may overwrite it after the step that contains it
    scale: float  # factor of the trained values
    weight: float  # weight in the mean; 1 unless the mode or the correction gives another one


class Aggregator(Protocol):
    """Interface of the aggregators, which collect the gradients of one round after another, for one partition."""

    keeps: bool  # True if it keeps the gradients themselves until the step; a state cannot contain its open round

    def __len__(self) -> int:
        """Return the number of gradients that are in no step yet."""

    def add(self, contribution: Contribution) -> None:
        """Add a gradient to the open round."""

    def set_live(self, live: AbstractSet[str]) -> None:
        """Set the names of the workers that have joined. Called after every push, step, leave and skip."""

    def close(self) -> Step:
        """Return the mean of the open round, and begin the next round."""

    def vectors(self, workers: int, scaled: bool) -> VectorCounts:
        """Return the number of vectors that the aggregator keeps.

        Args:
            workers: number of workers that push at the same time.
            scaled: True if gradients may come with a scale other than 1.
        """

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Return the open round as (arrays by name, JSON values by name), copied."""

    def load(self, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]) -> None:
        """Restore the open round from what `state()` returned, copied."""


class _Collector:
    """Base of the aggregators: does not look at the live workers and saves nothing. Subclasses override that."""

    keeps = False

    def set_live(self, live: AbstractSet[str]) -> None:
        """No-op: the round does not depend on the live workers."""

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Return nothing, because a server saves only between the rounds of such an aggregator."""
        return {}, {}

    def load(self, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]) -> None:
        """No-op: the state is empty."""


def _scale_into(out: FloatArray, values: FloatArray, trainable: int, scale: float, weight: float) -> FloatArray:
    """Write the scaled and weighted values into `out` and return it.

    Buffers follow the trained values. They are weighted but not scaled, as clipping is for gradients only.
    """
    np.multiply(values[:trainable], scale * weight, out=out[:trainable])
    np.multiply(values[trainable:], weight, out=out[trainable:])
    return out


class OneGradient(_Collector):
    """Rounds of one gradient, which is copied only if it has to be scaled."""

    def __init__(self, size: int, trainable: int) -> None:
        self._trainable = trainable
        self._scratch = np.empty(size, np.float32)
        self._contribution: Contribution | None = None

    def __len__(self) -> int:
        return self._contribution is not None

    def add(self, contribution: Contribution) -> None:
        """Set the gradient of the round."""
        assert self._contribution is None, "the round is closed after each gradient"
        self._contribution = contribution

    def close(self) -> Step:
        """Return the gradient, scaled if its scale is not 1."""
        contribution = self._contribution
        assert contribution is not None
        self._contribution = None
        values = contribution.values
        if contribution.scale != 1:
            values = _scale_into(self._scratch, values, self._trainable, contribution.scale, 1.0)
        return Step(values, contribution.weight, [contribution.member])

    def vectors(self, workers: int, scaled: bool) -> VectorCounts:
        """Count one vector for the scaled gradient."""
        return VectorCounts(1 if scaled else 0)


class RoundMean(_Collector):
    """Σ nᵢgᵢ / Σ nᵢ, where nᵢ is the number of examples of gradient gᵢ.

    Gradients are summed in BatchId order, not in the order of arrival, so that every run has the same bits.
    """

    keeps = True

    def __init__(self, size: int, trainable: int) -> None:
        self._trainable = trainable
        self._mean = np.empty(size, np.float32)
        self._scratch = np.empty(size, np.float32)
        self._round: list[Contribution] = []

    def __len__(self) -> int:
        return len(self._round)

    def add(self, contribution: Contribution) -> None:
        """Keep the gradient until the round closes."""
        self._round.append(contribution)

    def close(self) -> Step:
        """Return the mean, computed as Σ (nᵢ·N/Σn)·gᵢ / N; if all nᵢ are equal, the factors are exactly 1."""
        round_ = sorted(self._round, key=lambda contribution: contribution.batch)
        self._round = []
        weight = sum(contribution.weight for contribution in round_) / len(round_)
        members = [contribution.member for contribution in round_]
        if len(round_) == 1 and round_[0].scale == 1:
            return Step(round_[0].values, weight, members)
        examples = sum(member.examples for member in members)
        self._mean[:] = 0
        for contribution in round_:
            factor = contribution.member.examples * len(round_) / examples
            self._mean += _scale_into(self._scratch, contribution.values, self._trainable, contribution.scale, factor)
        self._mean /= len(round_)
        return Step(self._mean, weight, members)

    def vectors(self, workers: int, scaled: bool) -> VectorCounts:
        """Count the mean and a scratch vector. The gradients of the round are memory of their senders."""
        return VectorCounts(2 if scaled or workers > 1 else 0)


class RunningMean(_Collector):
    """Σ wᵢgᵢ / Σ wᵢ, summed in the order of arrival in one vector."""

    def __init__(self, size: int, trainable: int) -> None:
        self._trainable = trainable
        self._sum = np.zeros(size, np.float32)
        self._scratch = np.empty(size, np.float32)
        self._weight = 0.0
        self._members: list[StepMember] = []

    def __len__(self) -> int:
        return len(self._members)

    def add(self, contribution: Contribution) -> None:
        """Add the gradient to the sum."""
        _, _, member, values, scale, weight = contribution
        if self._members:
            self._sum += _scale_into(self._scratch, values, self._trainable, scale, weight)
        else:
            _scale_into(self._sum, values, self._trainable, scale, weight)
        self._weight += weight
        self._members.append(member)

    def close(self) -> Step:
        """Return the mean, in the memory of the sum."""
        self._sum /= self._weight
        step = Step(self._sum, self._weight / len(self._members), self._members)
        self._weight = 0.0
        self._members = []
        return step

    def vectors(self, workers: int, scaled: bool) -> VectorCounts:
        """Count the sum, which a state contains, and a scratch vector."""
        return VectorCounts(2, 1)

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Return `sum` `[partition size]` and its members; nothing if the round is empty."""
        if not self._members:
            return {}, {}
        return {"sum": self._sum.copy()}, {"weight": self._weight, "members": [list(m) for m in self._members]}

    def load(self, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]) -> None:
        """Restore the sum."""
        if metadata:
            self._sum[:] = arrays["sum"]
            self._weight = float(metadata["weight"])
            self._members = [StepMember(*member) for member in metadata["members"]]


class Table:
    """A sum of gradients for each worker.

    Its mean is (1/n) Σᵢ (1/Bᵢ) Σⱼ gᵢⱼ: all n workers have the same weight, whatever their numbers of gradients Bᵢ.

    Args:
        size: number of values of the partition.
        trainable: number of them before the first buffer.

    Attributes:
        counts: worker -> number of its gradients, Bᵢ.
        pending: the gradients that are in no step yet.
    """

    def __init__(self, size: int, trainable: int) -> None:
        self._size = size
        self._trainable = trainable
        self._sums: dict[str, FloatArray] = {}
        self._weight = 0.0
        self._mean = np.empty(size, np.float32)
        self._scratch = np.empty(size, np.float32)
        self.counts: dict[str, int] = {}
        self.pending: list[StepMember] = []

    def add(self, contribution: Contribution) -> None:
        """Add the gradient to the sum of its worker."""
        worker, _, member, values, scale, weight = contribution
        if worker not in self._sums:
            self._sums[worker] = np.zeros(self._size, np.float32)
        self._sums[worker] += _scale_into(self._scratch, values, self._trainable, scale, weight)
        self._weight += weight
        self.counts[worker] = self.counts.get(worker, 0) + 1
        self.pending.append(member)

    def step(self) -> Step:
        """Return a step on the mean. The table keeps its sums for further steps."""
        self._mean[:] = 0
        for worker, total in self._sums.items():
            self._mean += np.divide(total, self.counts[worker], out=self._scratch)
        self._mean /= len(self._sums)
        members = self.pending
        self.pending = []
        return Step(self._mean, self._weight / sum(self.counts.values()), members)

    def clear(self) -> None:
        """Remove all sums."""
        self._sums = {}
        self.counts = {}
        self._weight = 0.0
        self.pending = []

    def state(self, prefix: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Return the sum of each worker, `[partition size]`, as the array `PREFIX.WORKER`; and the counts."""
        arrays = {f"{prefix}.{worker}": total.copy() for worker, total in self._sums.items()}
        return arrays, {
            "counts": dict(self.counts),
            "weight": self._weight,
            "fresh": [list(member) for member in self.pending],
        }

    def load(self, prefix: str, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]) -> None:
        """Restore the sums from the arrays `PREFIX.WORKER` and the counts."""
        self.counts = {worker: int(count) for worker, count in metadata["counts"].items()}
        # In the order of `counts`: storage returns arrays in any order, and a mean's last bits depend on the order.
        self._sums = {worker: arrays[f"{prefix}.{worker}"].astype(np.float32) for worker in self.counts}
        self._weight = float(metadata["weight"])
        self.pending = [StepMember(*member) for member in metadata["fresh"]]


class TableMean(_Collector):
    """The mean of the workers' means: one step on each table.

    Attributes:
        table: sums of the open round.
    """

    def __init__(self, size: int, trainable: int) -> None:
        self.table = Table(size, trainable)

    def __len__(self) -> int:
        return len(self.table.pending)

    def add(self, contribution: Contribution) -> None:
        """Add the gradient to the sum of its worker."""
        self.table.add(contribution)

    def close(self) -> Step:
        """Return the mean, and empty the table."""
        step = self.table.step()
        self.table.clear()
        return step

    def vectors(self, workers: int, scaled: bool) -> VectorCounts:
        """Count a sum for each worker, which a state contains, the mean, and a scratch vector."""
        return VectorCounts(workers + 2, workers)

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Return the sums and counts of the table."""
        return self.table.state("table")

    def load(self, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]) -> None:
        """Restore the table."""
        self.table.load("table", arrays, metadata)


class RingleaderTables(_Collector):
    """Ringleader's two tables (Maranjyan and Richtárik, 2026).

    1. The present table collects gradients until every live worker has one in it.
    2. Then each live worker is owed one step on that table. The worker that completed the table gets its step at once;
       each other worker gets its step with its next gradient, which is added to the present table.
    3. Meanwhile, gradients of workers that are owed no step go to the next table.
    4. When no worker is owed a step any more, the next table becomes the present one.
    """

    def __init__(self, size: int, trainable: int) -> None:
        self._table = Table(size, trainable)
        self._next = Table(size, trainable)
        self._owed: set[str] = set()  # workers that are still owed a step on the present table
        self._last_worker = ""  # the worker that pushed last
        self._step_due = False

    def __len__(self) -> int:
        return len(self._table.pending) + len(self._next.pending)

    @property
    def _collecting(self) -> bool:
        return not self._owed and not self._step_due

    def add(self, contribution: Contribution) -> None:
        """Add the gradient to the present table or to the next one, and note whether it makes a step due."""
        self._last_worker = contribution.worker
        if self._collecting:
            self._table.add(contribution)
        elif contribution.worker in self._owed:
            self._owed.remove(contribution.worker)
            self._table.add(contribution)
            self._step_due = True
        else:
            self._next.add(contribution)

    def owes_step(self) -> bool:
        """Return True if a step on the present table is due now."""
        return self._step_due

    def set_live(self, live: AbstractSet[str]) -> None:
        """Drop the steps owed to workers that are gone. Begin the steps if all live workers are in the table."""
        if self._owed:
            self._owed.intersection_update(live)
            if self._collecting:
                self._swap_tables()
        if self._collecting and self._table.counts and live <= self._table.counts.keys():
            self._owed = set(live) - {self._last_worker}
            self._step_due = True

    def close(self) -> Step:
        """Return a step on the present table.

        At an epoch's end no step is due: the step then is on the table that has pending gradients.
        """
        if not self._step_due and self._next.pending:
            self._owed = set()
            self._swap_tables()
        step = self._table.step()
        flushed = not self._step_due
        self._step_due = False
        if flushed or not self._owed:
            self._swap_tables()
        return step

    def _swap_tables(self) -> None:
        self._table.clear()
        self._table, self._next = self._next, self._table

    def vectors(self, workers: int, scaled: bool) -> VectorCounts:
        """Count the sums of two tables, which a state contains, and a mean and a scratch vector for each table.

        The next table never has the sum of the worker that is owed the last step on the present one.
        """
        sums = 2 * workers - 1
        return VectorCounts(sums + 4, sums)

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Return both tables, the workers that are owed a step, and the worker that pushed last."""
        arrays, table = self._table.state("table")
        next_arrays, next_table = self._next.state("next")
        metadata = {"table": table, "next": next_table, "owed": sorted(self._owed), "last": self._last_worker}
        return arrays | next_arrays, metadata

    def load(self, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]) -> None:
        """Restore both tables."""
        self._table.load("table", arrays, metadata["table"])
        self._next.load("next", arrays, metadata["next"])
        self._owed = set(metadata["owed"])
        self._last_worker = str(metadata["last"])
