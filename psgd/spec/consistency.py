"""The consistency section of a job: which gradients form a step, and which workers wait for it.

Each mode's class states once what follows from it, as `traits`, `discards_late`, `stop_at` and `local_steps`.
One-letter fields are the papers' symbols.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from psgd_workers.spec import Count, LocalSteps, Spec, Whole

__all__ = [
    "AsyncConsistency",
    "BackupConsistency",
    "BspConsistency",
    "BufferedConsistency",
    "ConsistencySpec",
    "KSyncConsistency",
    "LocalConsistency",
    "MaleniaConsistency",
    "ModeTraits",
    "RennalaConsistency",
    "RingleaderConsistency",
    "RingmasterConsistency",
    "SoftsyncConsistency",
    "SspConsistency",
]


@dataclass(frozen=True, slots=True)
class ModeTraits:
    """Properties of a mode that decide what it can be combined with."""

    fresh_only: bool = False  # a gradient enters a step only if it was computed from the present weights
    chooses_gradients: bool = False  # the order of arrival decides which gradients form a step: one server only
    workers_wait: bool = False  # for each other
    mixes_staleness: bool = False  # a step may average gradients of several versions


class _Mode(Spec):
    _traits: ClassVar[ModeTraits] = ModeTraits()

    @property
    def traits(self) -> ModeTraits:
        """Properties of this mode, with these fields."""
        return self._traits

    @property
    def discards_late(self) -> bool:
        """Return True if the batch of a refused gradient is dropped instead of computed again."""
        return False

    @property
    def stop_at(self) -> int | None:
        """Staleness from which on a worker does not push a finished gradient. None: it pushes every gradient."""
        return None

    @property
    def local_steps(self) -> LocalSteps | None:
        """Steps that a worker takes by itself before each push. None: it pushes gradients."""
        return None


class _Refusing(_Mode):
    late: Literal["requeue", "discard"] = "requeue"
    """What happens to the batch of a refused gradient. `requeue`: it is computed again, so that an epoch still uses
    every example exactly once. `discard`: it is dropped and counted in the result."""
    stop: bool = False
    """true: a worker gives up a gradient that would be refused. It compares versions when the computation is done, and
    does not push: that saves the push, not the computation."""

    @property
    def discards_late(self) -> bool:
        return self.late == "discard"

    @property
    def stop_at(self) -> int | None:
        return self._refused_from if self.stop else None

    @property
    def _refused_from(self) -> int:
        return 1  # the modes that refuse admit nothing stale, unless they say otherwise


class AsyncConsistency(_Mode):
    """Every gradient is a step of its own, as soon as it arrives. The fastest mode; gradients are stale."""

    mode: Literal["async"] = "async"
    """The mode. The other fields of `consistency` depend on it."""


class BspConsistency(_Mode):
    """Bulk synchronous parallel: a step is the mean of one gradient of each worker, weighted by examples. Every worker
    waits for the slowest."""

    _traits: ClassVar[ModeTraits] = ModeTraits(fresh_only=True, workers_wait=True)
    mode: Literal["bsp"]
    """The mode. The other fields of `consistency` depend on it."""


class KSyncConsistency(_Refusing):
    """A step is the mean of the first `k` gradients that were computed from the present weights. Later ones are
    refused."""

    _traits: ClassVar[ModeTraits] = ModeTraits(fresh_only=True, chooses_gradients=True, workers_wait=True)
    mode: Literal["k_sync"]
    """The mode. The other fields of `consistency` depend on it."""
    k: Count
    """Gradients per step, at most the number of workers. Lower: less waiting for slow workers, more gradients are
    refused."""


class BackupConsistency(_Refusing):
    """A step is the mean of one gradient of each worker except for the `b` slowest, all computed from the present
    weights. Later ones are refused."""

    _traits: ClassVar[ModeTraits] = ModeTraits(fresh_only=True, chooses_gradients=True, workers_wait=True)
    mode: Literal["backup"]
    """The mode. The other fields of `consistency` depend on it."""
    b: Whole = Field(ge=0)
    """Number of workers that a step does not wait for, below the number of workers. Higher: less waiting for slow
    workers, more gradients are refused."""


class SspConsistency(_Mode):
    """Stale synchronous parallel: every gradient is a step, and no worker starts a batch more than `s` batches ahead of
    the slowest worker."""

    _traits: ClassVar[ModeTraits] = ModeTraits(workers_wait=True)
    mode: Literal["ssp"]
    """The mode. The other fields of `consistency` depend on it."""
    s: Whole = Field(ge=0)
    """Number of batches that a worker may be ahead of the slowest. 0: all workers in lock-step. Higher: less waiting,
    staler gradients."""


class SoftsyncConsistency(_Mode):
    """A step is the mean of n // `s` gradients of any staleness, where n is the number of workers. No worker waits."""

    _traits: ClassVar[ModeTraits] = ModeTraits(mixes_staleness=True)
    mode: Literal["softsync"]
    """The mode. The other fields of `consistency` depend on it."""
    s: Count
    """About the mean staleness, at most the number of workers. 1: a step holds n gradients. n: each gradient is a step,
    as in `async`."""


class RingmasterConsistency(_Refusing):
    """Every gradient is a step, except for those with a staleness of `r` or more, which are refused."""

    mode: Literal["ringmaster"]
    """The mode. The other fields of `consistency` depend on it."""
    r: Count
    """Staleness from which on gradients are refused. 1: no staleness at all. Higher: fewer are refused, and
    `optimizer.lr` must be lower."""

    @property
    def _refused_from(self) -> int:
        return self.r


class RennalaConsistency(_Refusing):
    """A step is the mean of `s` gradients that were computed from the present weights, by any workers. Stale gradients
    are refused. No worker waits."""

    _traits: ClassVar[ModeTraits] = ModeTraits(fresh_only=True, chooses_gradients=True)
    mode: Literal["rennala"]
    """The mode. The other fields of `consistency` depend on it."""
    s: Count
    """Gradients per step. Higher: steadier steps, and fewer of them."""


class MaleniaConsistency(_Refusing):
    """A step is the mean of the workers' means, so that fast and slow workers count alike. Stale gradients are refused.

    A step is made when every worker has given a gradient and the mean of 1 / (gradients of a worker) is at most
    n / `s`, where n is the number of workers.
    """

    _traits: ClassVar[ModeTraits] = ModeTraits(fresh_only=True, chooses_gradients=True)
    mode: Literal["malenia"]
    """The mode. The other fields of `consistency` depend on it."""
    s: Count
    """Gradients per step if all workers are equally fast. Higher: steadier steps, and fewer of them."""


class RingleaderConsistency(_Mode):
    """A table holds the gradients of each worker. Once it has one of every worker, n steps follow, each along the mean
    of the workers' means.

    During these steps the next gradient of each worker joins the table; further ones wait for the next table.
    """

    _traits: ClassVar[ModeTraits] = ModeTraits(chooses_gradients=True)
    mode: Literal["ringleader"]
    """The mode. The other fields of `consistency` depend on it."""


class BufferedConsistency(_Mode):
    """A step is the mean of `k` gradients of any staleness, each weighted by 1/√(1 + staleness). No worker waits."""

    _traits: ClassVar[ModeTraits] = ModeTraits(mixes_staleness=True)
    mode: Literal["buffered"]
    """The mode. The other fields of `consistency` depend on it."""
    k: Count
    """Gradients per step. Higher: steadier steps, and fewer of them."""


class LocalConsistency(_Mode):
    """A worker takes `h` steps of plain SGD by itself, and pushes the sum of these steps. `optimizer` applies it like a
    gradient.

    With `optimizer: {lr: 1}` a server moves by exactly that sum; `{lr: 0.7, momentum: 0.9, nesterov: true}` is DiLoCo.
    """

    mode: Literal["local"]
    """The mode. The other fields of `consistency` depend on it."""
    h: Count
    """Steps between two pushes, each on a mini-batch of `data.batch_size`. Higher: fewer pushes, and the workers'
    weights drift apart."""
    lr: float = Field(gt=0)
    """Learning rate of the workers' own steps. `optimizer.lr` is that of the servers."""
    synchronous: bool = False
    """true: a step is the mean of one push of each worker, as in `bsp`. false: every push is a step, as in `async`."""

    @property
    def traits(self) -> ModeTraits:
        return ModeTraits(fresh_only=self.synchronous, workers_wait=self.synchronous)

    @property
    def local_steps(self) -> LocalSteps:
        return LocalSteps(steps=self.h, lr=self.lr)


ConsistencySpec = Annotated[
    AsyncConsistency
    | BackupConsistency
    | BspConsistency
    | BufferedConsistency
    | KSyncConsistency
    | LocalConsistency
    | MaleniaConsistency
    | RennalaConsistency
    | RingleaderConsistency
    | RingmasterConsistency
    | SoftsyncConsistency
    | SspConsistency,
    Field(discriminator="mode"),
]
