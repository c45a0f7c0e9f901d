"""Aggregators: what the gradients of a round become. Each gives their mean; they differ in what they must remember.

A gradient comes with a `scale`, by which its trained values are multiplied (clipping), and a `weight`, which says how
much it counts. The mean is Σ wᵢ·gᵢ / Σ wᵢ, and the mean weight Σ wᵢ / n scales the rate of the step, so that a step is
η·(1/n)·Σ wᵢ·gᵢ, as the papers have it, whatever the optimizer makes of its gradient's length.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from psgd.core.server.state import Vectors
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
    """A gradient in a step, as the accounts need it."""

    updates_read: int
    examples: int


class Step(NamedTuple):
    """What an optimizer steps on."""

    gradient: FloatArray  # [partition size], the aggregator's or the last gradient's own: to read
    weight: float  # mean weight
    members: list[StepMember]  # the gradients that no step held before


class Contribution(NamedTuple):
    """A gradient on its way into a round."""

    worker: str
    batch: BatchId
    member: StepMember
    values: FloatArray  # [partition size]; may be overwritten after the step that holds it
    scale: float
    weight: float


class Aggregator(Protocol):
    """Collects one round after another, for one partition."""

    keeps: bool  # whether it holds on to the gradients until the step; then an open round is in no state

    def __len__(self) -> int:
        """Gradients that are in no step yet."""

    def add(self, taken: Contribution) -> None:
        """Take a gradient in."""

    def follow(self, live: AbstractSet[str]) -> None:
        """Learn which workers are live; called after every push, step and leave."""

    def close(self) -> Step:
        """The round's mean; the next round begins."""

    def vectors(self, workers: int, scaled: bool) -> Vectors:
        """Return how many vectors the aggregator keeps.

        Args:
            workers: how many push at the same time.
            scaled: true if gradients come with a scale other than 1.
        """

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Arrays, and plain JSON values, of the open round."""

    def load(self, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]) -> None:
        """Take over what `state()` gave."""


class _Collector:
    """An aggregator that has nothing to save between rounds and does not look at who is live."""

    keeps = False

    def follow(self, live: AbstractSet[str]) -> None:
        """The round is the same whichever workers are live."""

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Nothing: a state is taken between rounds."""
        return {}, {}

    def load(self, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]) -> None:
        """Nothing to take over."""


def _scale_into(out: FloatArray, values: FloatArray, trainable: int, scale: float, weight: float) -> FloatArray:
    """Buffers, behind the trained values, are weighted like them but never clipped: they are no gradients."""
    np.multiply(values[:trainable], scale * weight, out=out[:trainable])
    np.multiply(values[trainable:], weight, out=out[trainable:])
    return out


class OneGradient(_Collector):
    """A round is one gradient, which is not copied unless it has to be scaled."""

    def __init__(self, size: int, trainable: int) -> None:
        self._trainable = trainable
        self._scratch = np.empty(size, np.float32)
        self._taken: Contribution | None = None

    def __len__(self) -> int:
        return self._taken is not None

    def add(self, taken: Contribution) -> None:
        """Take the one gradient."""
        assert self._taken is None, "the round is closed after each gradient"
        self._taken = taken

    def close(self) -> Step:
        """The gradient itself."""
        taken, self._taken = self._taken, None
        assert taken is not None
        values = taken.values
        if taken.scale != 1:
            values = _scale_into(self._scratch, values, self._trainable, taken.scale, 1.0)
        return Step(values, taken.weight, [taken.member])

    def vectors(self, workers: int, scaled: bool) -> Vectors:
        """The scaled gradient, if it has to be scaled."""
        return Vectors(1 if scaled else 0)


class RoundMean(_Collector):
    """Σ nᵢgᵢ / Σ nᵢ by examples, summed in BatchId order whatever the order of arrival: the same bits in every run."""

    keeps = True

    def __init__(self, size: int, trainable: int) -> None:
        self._trainable = trainable
        self._mean = np.empty(size, np.float32)
        self._scratch = np.empty(size, np.float32)
        self._round: list[Contribution] = []

    def __len__(self) -> int:
        return len(self._round)

    def add(self, taken: Contribution) -> None:
        """Keep the gradient."""
        self._round.append(taken)

    def close(self) -> Step:
        """Σ (nᵢ·N/Σn)·gᵢ / N; with equal nᵢ the factors are exactly 1."""
        members = sorted(self._round, key=lambda taken: taken.batch)
        self._round = []
        weight = sum(taken.weight for taken in members) / len(members)
        metadata = [taken.member for taken in members]
        if len(members) == 1 and members[0].scale == 1:
            return Step(members[0].values, weight, metadata)
        examples = sum(taken.member.examples for taken in members)
        self._mean[:] = 0
        for taken in members:
            factor = taken.member.examples * len(members) / examples
            self._mean += _scale_into(self._scratch, taken.values, self._trainable, taken.scale, factor)
        self._mean /= len(members)
        return Step(self._mean, weight, metadata)

    def vectors(self, workers: int, scaled: bool) -> Vectors:
        """The mean and one to compute in. The gradients of the round are their senders' own."""
        return Vectors(2 if scaled or workers > 1 else 0)


class RunningMean(_Collector):
    """Σ wᵢgᵢ / Σ wᵢ in the order of arrival: one vector, however many gradients."""

    def __init__(self, size: int, trainable: int) -> None:
        self._trainable = trainable
        self._sum = np.zeros(size, np.float32)
        self._scratch = np.empty(size, np.float32)
        self._weight = 0.0
        self._members: list[StepMember] = []

    def __len__(self) -> int:
        return len(self._members)

    def add(self, taken: Contribution) -> None:
        """Add to the sum."""
        if self._members:
            self._sum += _scale_into(self._scratch, taken.values, self._trainable, taken.scale, taken.weight)
        else:
            _scale_into(self._sum, taken.values, self._trainable, taken.scale, taken.weight)
        self._weight += taken.weight
        self._members.append(taken.member)

    def close(self) -> Step:
        """The mean, in the sum's own memory."""
        self._sum /= self._weight
        step = Step(self._sum, self._weight / len(self._members), self._members)
        self._weight = 0.0
        self._members = []
        return step

    def vectors(self, workers: int, scaled: bool) -> Vectors:
        """The sum, which is saved with an open round, and one to compute in."""
        return Vectors(2, 1)

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """The sum `[partition size]`, while there is one."""
        if not self._members:
            return {}, {}
        return {"sum": self._sum.copy()}, {"weight": self._weight, "members": [list(m) for m in self._members]}

    def load(self, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]) -> None:
        """Go on with that sum."""
        if metadata:
            self._sum[:] = arrays["sum"]
            self._weight = float(metadata["weight"])
            self._members = [StepMember(*member) for member in metadata["members"]]


class Table:
    """A sum of gradients for each worker; its mean is (1/n) Σᵢ (1/Bᵢ) Σⱼ gᵢⱼ, so that all workers count alike.

    Attributes:
        counts: worker -> its gradients, Bᵢ.
        fresh: the gradients that are in no step yet.
    """

    def __init__(self, size: int, trainable: int) -> None:
        self._size = size
        self._trainable = trainable
        self._sums: dict[str, FloatArray] = {}
        self._weight = 0.0
        self._mean = np.empty(size, np.float32)
        self._scratch = np.empty(size, np.float32)
        self.counts: dict[str, int] = {}
        self.fresh: list[StepMember] = []

    def add(self, taken: Contribution) -> None:
        """Add to the worker's sum."""
        if taken.worker not in self._sums:
            self._sums[taken.worker] = np.zeros(self._size, np.float32)
        self._sums[taken.worker] += _scale_into(self._scratch, taken.values, self._trainable, taken.scale, taken.weight)
        self._weight += taken.weight
        self.counts[taken.worker] = self.counts.get(taken.worker, 0) + 1
        self.fresh.append(taken.member)

    def step(self) -> Step:
        """A step on the mean; the table stays."""
        self._mean[:] = 0
        for worker, total in self._sums.items():
            self._mean += np.divide(total, self.counts[worker], out=self._scratch)
        self._mean /= len(self._sums)
        fresh, self.fresh = self.fresh, []
        return Step(self._mean, self._weight / sum(self.counts.values()), fresh)

    def clear(self) -> None:
        """Forget everything."""
        self._sums = {}
        self.counts = {}
        self._weight = 0.0
        self.fresh = []

    def state(self, prefix: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Each worker's sum `[partition size]`, under names that begin with the prefix; and the counts."""
        arrays = {f"{prefix}.{worker}": total.copy() for worker, total in self._sums.items()}
        return arrays, {
            "counts": dict(self.counts),
            "weight": self._weight,
            "fresh": [list(member) for member in self.fresh],
        }

    def load(self, prefix: str, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]) -> None:
        """Go on with those sums."""
        self.counts = {worker: int(count) for worker, count in metadata["counts"].items()}
        # In the order in which they came: storage gives arrays back in any, and a mean's last bits depend on it.
        self._sums = {worker: arrays[f"{prefix}.{worker}"].astype(np.float32) for worker in self.counts}
        self._weight = float(metadata["weight"])
        self.fresh = [StepMember(*member) for member in metadata["fresh"]]


class TableMean(_Collector):
    """The mean of the workers' means, once for each table.

    Attributes:
        table: of the open round.
    """

    def __init__(self, size: int, trainable: int) -> None:
        self.table = Table(size, trainable)

    def __len__(self) -> int:
        return len(self.table.fresh)

    def add(self, taken: Contribution) -> None:
        """Add to the worker's sum."""
        self.table.add(taken)

    def close(self) -> Step:
        """The mean; the next table begins."""
        step = self.table.step()
        self.table.clear()
        return step

    def vectors(self, workers: int, scaled: bool) -> Vectors:
        """A sum for each worker, their mean, and one to compute in."""
        return Vectors(workers + 2, workers)

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """The table."""
        return self.table.state("table")

    def load(self, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]) -> None:
        """Go on with that table."""
        self.table.load("table", arrays, metadata)


class RingleaderTables(_Collector):
    """Ringleader's two tables: one that steps are made of, one that collects what comes beyond (Maranjyan, 2026).

    Once every live worker is in the table, each of them is owed a step: the first at once, then one with each one's
    next gradient, which joins the table. What a worker brings while it is owed none waits for the next table.
    """

    def __init__(self, size: int, trainable: int) -> None:
        self._table = Table(size, trainable)
        self._next = Table(size, trainable)
        self._owed: set[str] = set()
        self._last = ""  # the worker that pushed last
        self._due = False

    def __len__(self) -> int:
        return len(self._table.fresh) + len(self._next.fresh)

    @property
    def _collecting(self) -> bool:
        return not self._owed and not self._due

    def add(self, taken: Contribution) -> None:
        """Into the table, or into the next one."""
        self._last = taken.worker
        if self._collecting:
            self._table.add(taken)
        elif taken.worker in self._owed:
            self._owed.remove(taken.worker)
            self._table.add(taken)
            self._due = True
        else:
            self._next.add(taken)

    def owes_step(self) -> bool:
        """Return True if the table is to become a step now."""
        return self._due

    def follow(self, live: AbstractSet[str]) -> None:
        """Owe and await nothing of workers that are not live; a table that has all the others owes its steps."""
        if self._owed:
            self._owed.intersection_update(live)
            if self._collecting:
                self._turn()
        if self._collecting and self._table.counts and live <= self._table.counts.keys():
            self._owed = set(live) - {self._last}
            self._due = True

    def close(self) -> Step:
        """A step on the table, or, at an epoch's end, on what no step holds yet."""
        if not self._due and self._next.fresh:
            self._owed = set()
            self._turn()
        step = self._table.step()
        flushed = not self._due
        self._due = False
        if flushed or not self._owed:
            self._turn()
        return step

    def _turn(self) -> None:
        self._table.clear()
        self._table, self._next = self._next, self._table

    def vectors(self, workers: int, scaled: bool) -> Vectors:
        """Two tables; the next one lacks the worker that the present one owes its last step."""
        sums = 2 * workers - 1
        return Vectors(sums + 4, sums)

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Both tables, and who is owed a step."""
        (arrays, table) = self._table.state("table")
        (others, following) = self._next.state("next")
        metadata = {"table": table, "next": following, "owed": sorted(self._owed), "last": self._last}
        return arrays | others, metadata

    def load(self, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]) -> None:
        """Go on with those."""
        self._table.load("table", arrays, metadata["table"])
        self._next.load("next", arrays, metadata["next"])
        self._owed = set(metadata["owed"])
        self._last = str(metadata["last"])
