"""The consistency section of a job: which gradients form a step, and which workers wait for it.

The class of a mode states its consequences for the rest of psgd: `traits`, `discards_late`, `stop_at` and
`local_steps`. One-letter fields are the symbols of the papers.
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
    """Properties of a mode that decide which other settings it can be combined with."""

    fresh_only: bool = False  # only gradients computed from the current weights enter a step
    chooses_gradients: bool = False  # the order of arrival decides which gradients form a step: needs a single server
    workers_wait: bool = False  # workers wait for each other
    mixes_staleness: bool = False  # a step may average gradients of several versions


class _Mode(Spec):
    _traits: ClassVar[ModeTraits] = ModeTraits()

    @property
    def traits(self) -> ModeTraits:
        """Properties of this mode with its fields."""
        return self._traits

    @property
    def discards_late(self) -> bool:
        """Return True if the batch of a refused gradient is dropped instead of computed again."""
        return False

    @property
    def stop_at(self) -> int | None:
        """Smallest staleness at which a worker does not push its finished gradient; None if it pushes all gradients."""
        return None

    @property
    def local_steps(self) -> LocalSteps | None:
        """Steps that a worker takes by itself before each push; None if it pushes gradients."""
        return None


class _Refusing(_Mode):
    late: Literal["requeue", "discard"] = "requeue"
    """The treatment of the batch of a refused gradient. `requeue`: a worker computes it again, so that an epoch still
    uses every example exactly once. `discard`: the epoch goes on without it, and the result counts it."""
    stop: bool = False
    """true: a worker does not send a finished gradient that the server would refuse. This saves the transfer, but not
    the computation."""

    @property
    def discards_late(self) -> bool:
        return self.late == "discard"

    @property
    def stop_at(self) -> int | None:
        return self._refused_from if self.stop else None

    @property
    def _refused_from(self) -> int:
        return 1  # the default of the modes that refuse gradients: any staleness is too much


class AsyncConsistency(_Mode):
    """Each gradient becomes a step as soon as it arrives, and no worker waits. The mode with the most steps per second;
    most gradients are stale."""

    mode: Literal["async"] = "async"
    """The mode. The other fields of `consistency` depend on it."""


class BspConsistency(_Mode):
    """Bulk synchronous parallel: a step uses the mean of one gradient from each worker, weighted by the number of
    examples. All workers wait for the slowest."""

    _traits: ClassVar[ModeTraits] = ModeTraits(fresh_only=True, workers_wait=True)
    mode: Literal["bsp"]
    """The mode. The other fields of `consistency` depend on it."""


class KSyncConsistency(_Refusing):
    """A step uses the mean of the first `k` gradients that were computed from the current weights. The gradients
    that arrive after these `k` are refused."""

    _traits: ClassVar[ModeTraits] = ModeTraits(fresh_only=True, chooses_gradients=True, workers_wait=True)
    mode: Literal["k_sync"]
    """The mode. The other fields of `consistency` depend on it."""
    k: Count
    """Number of gradients per step, at most the number of workers. Lower: less waiting for slow workers, and more
    gradients are refused."""


class BackupConsistency(_Refusing):
    """A step uses the mean of one gradient from each worker, without the `b` slowest workers. All these gradients
    were computed from the current weights; gradients that arrive later are refused."""

    _traits: ClassVar[ModeTraits] = ModeTraits(fresh_only=True, chooses_gradients=True, workers_wait=True)
    mode: Literal["backup"]
    """The mode. The other fields of `consistency` depend on it."""
    b: Whole = Field(ge=0)
    """Number of workers that a step does not wait for; less than the number of workers. Higher: less waiting for slow
    workers, and more gradients are refused."""


class SspConsistency(_Mode):
    """Stale synchronous parallel: each gradient becomes a step as soon as it arrives, but a worker that is more than
    `s` batches ahead of the slowest worker waits."""

    _traits: ClassVar[ModeTraits] = ModeTraits(workers_wait=True)
    mode: Literal["ssp"]
    """The mode. The other fields of `consistency` depend on it."""
    s: Whole = Field(ge=0)
    """Number of batches that a worker may be ahead of the slowest one. 0: each worker waits for all others after every
    batch. Higher: less waiting, and staler gradients."""


class SoftsyncConsistency(_Mode):
    """A step uses the mean of the next ⌊n / `s`⌋ gradients, stale or not, where n is the number of workers. No
    worker waits."""

    _traits: ClassVar[ModeTraits] = ModeTraits(mixes_staleness=True)
    mode: Literal["softsync"]
    """The mode. The other fields of `consistency` depend on it."""
    s: Count
    """Roughly the mean staleness; at most the number of workers n. 1: a step combines n gradients. n: each gradient is
    a step, as in `async`."""


class RingmasterConsistency(_Refusing):
    """Each gradient becomes a step as soon as it arrives, unless its staleness is `r` or more: then it is refused."""

    mode: Literal["ringmaster"]
    """The mode. The other fields of `consistency` depend on it."""
    r: Count
    """Smallest staleness at which a gradient is refused. 1: every stale gradient is refused. Higher: fewer gradients
    are refused, and `optimizer.lr` must be lower."""

    @property
    def _refused_from(self) -> int:
        return self.r


class RennalaConsistency(_Refusing):
    """A step uses the mean of `s` gradients that were computed from the current weights, whichever workers sent
    them. Stale gradients are refused. No worker waits."""

    _traits: ClassVar[ModeTraits] = ModeTraits(fresh_only=True, chooses_gradients=True)
    mode: Literal["rennala"]
    """The mode. The other fields of `consistency` depend on it."""
    s: Count
    """Number of gradients per step. Higher: steadier steps, and fewer of them."""


class MaleniaConsistency(_Refusing):
    """A step uses the mean of the workers' mean gradients, so that a fast worker does not count more than a slow
    one. Stale gradients are refused.

    A step is taken once every worker has sent at least one gradient and the mean of 1 / (number of gradients) over the
    workers is at most n / `s`, where n is the number of workers.
    """

    _traits: ClassVar[ModeTraits] = ModeTraits(fresh_only=True, chooses_gradients=True)
    mode: Literal["malenia"]
    """The mode. The other fields of `consistency` depend on it."""
    s: Count
    """Number of gradients per step if all workers are equally fast. Higher: steadier steps, and fewer of them."""


class RingleaderConsistency(_Mode):
    """The server collects the gradients of each of the n workers in a table. Once the table has a gradient of every
    worker, the server takes n steps, each with the mean of the workers' mean gradients.

    During these steps, each worker adds its next gradient to the table. Further gradients go into the next table.
    """

    _traits: ClassVar[ModeTraits] = ModeTraits(chooses_gradients=True)
    mode: Literal["ringleader"]
    """The mode. The other fields of `consistency` depend on it."""


class BufferedConsistency(_Mode):
    """A step uses the mean of the next `k` gradients, stale or not, each multiplied by 1/√(1 + staleness). No
    worker waits."""

    _traits: ClassVar[ModeTraits] = ModeTraits(mixes_staleness=True)
    mode: Literal["buffered"]
    """The mode. The other fields of `consistency` depend on it."""
    k: Count
    """Number of gradients per step. Higher: steadier steps, and fewer of them."""


class LocalConsistency(_Mode):
    """A worker takes `h` steps of plain SGD on its own copy of the weights, and pushes the sum of these steps. The
    servers' optimizer treats this sum like a gradient.

    With `optimizer: {lr: 1}` the servers take exactly the worker's steps. With `optimizer: {lr: 0.7, momentum: 0.9,
    nesterov: true}` this is DiLoCo.
    """

    mode: Literal["local"]
    """The mode. The other fields of `consistency` depend on it."""
    h: Count
    """Number of steps between two pushes, each on `data.batch_size` examples. Higher: fewer pushes, and the weights of
    the workers drift further apart."""
    lr: float = Field(gt=0)
    """Learning rate of the workers' own steps. The servers use `optimizer.lr`."""
    synchronous: bool = False
    """true: a step uses the mean of one push from each worker, as in `bsp`. false: each push is a step, as in
    `async`."""

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
