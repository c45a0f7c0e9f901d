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
    "BaseAggregator",
    "Contribution",
    "OneGradient",
    "RoundMean",
    "RunningMean",
    "Step",
    "StepMember",
    "scale_into",
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


class BaseAggregator:
    """Base of the aggregators: ignores the live workers, and has nothing to save. Some subclasses override this."""

    keeps = False

    def set_live(self, live: AbstractSet[str]) -> None:
        """No-op: the round does not depend on the live workers."""

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Return nothing, because a server saves only between the rounds of such an aggregator."""
        return {}, {}

    def load(self, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]) -> None:
        """No-op: the state is empty."""


def scale_into(out: FloatArray, values: FloatArray, trainable: int, scale: float, weight: float) -> FloatArray:
    """Write the scaled and weighted values into `out` and return it.

    Args:
        out: `[partition size]`, overwritten.
        values: `[partition size]`, the trained values and then the buffers.
        trainable: number of trained values.
        scale: factor of the trained values only, because buffers are not clipped.
        weight: factor of all values.
    """
    np.multiply(values[:trainable], scale * weight, out=out[:trainable])
    np.multiply(values[trainable:], weight, out=out[trainable:])
    return out


class OneGradient(BaseAggregator):
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
            values = scale_into(self._scratch, values, self._trainable, contribution.scale, 1.0)
        return Step(values, contribution.weight, [contribution.member])

    def vectors(self, workers: int, scaled: bool) -> VectorCounts:
        """Count one vector for the scaled gradient."""
        return VectorCounts(1 if scaled else 0)


class RoundMean(BaseAggregator):
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
            self._mean += scale_into(self._scratch, contribution.values, self._trainable, contribution.scale, factor)
        self._mean /= len(round_)
        return Step(self._mean, weight, members)

    def vectors(self, workers: int, scaled: bool) -> VectorCounts:
        """Count the mean and a scratch vector. The gradients of the round are memory of their senders."""
        return VectorCounts(2 if scaled or workers > 1 else 0)


class RunningMean(BaseAggregator):
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
            self._sum += scale_into(self._scratch, values, self._trainable, scale, weight)
        else:
            scale_into(self._sum, values, self._trainable, scale, weight)
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
