"""What a job says about how its workers wait for each other. One-letter fields are the papers' symbols."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from psgd_workers.spec import Spec

__all__ = [
    "AsyncConsistency",
    "BackupConsistency",
    "BspConsistency",
    "BufferedConsistency",
    "ConsistencySpec",
    "KSyncConsistency",
    "LocalConsistency",
    "MaleniaConsistency",
    "RennalaConsistency",
    "RingleaderConsistency",
    "RingmasterConsistency",
    "SoftsyncConsistency",
    "SspConsistency",
]


class _Late(Spec):
    late: Literal["requeue", "discard"] = "requeue"
    """What becomes of a refused gradient's batch. `requeue`: it is computed again, and every epoch is exact.
    `discard`: it is dropped, and the result says how many were."""
    stop: bool = False
    """Whether a computation whose gradient would be refused is called off: at once in simulation; a real worker looks
    before it pushes."""


class AsyncConsistency(Spec):
    """Every gradient is a step of its own, as soon as it arrives: fastest, at the price of staleness."""

    mode: Literal["async"] = "async"
    """Which mode."""


class BspConsistency(Spec):
    """Bulk synchronous: one step on the mean of one gradient of each live worker, weighted by examples."""

    mode: Literal["bsp"]
    """Which mode."""


class KSyncConsistency(_Late):
    """One step on the mean of the first `k` gradients of the present version; later ones are refused."""

    mode: Literal["k_sync"]
    """Which mode."""
    k: int = Field(ge=1)
    """Gradients in a step, at most as many as workers. Lower: slow workers hold less up, and more is refused."""


class BackupConsistency(_Late):
    """`k_sync` of all live workers but `b`."""

    mode: Literal["backup"]
    """Which mode."""
    b: int = Field(ge=0)
    """Workers that a step does without, fewer than there are. Higher: slow workers hold less up, more is refused."""


class SspConsistency(Spec):
    """Stale synchronous parallel: as `async`, but nobody starts more than `s` batches ahead of the slowest."""

    mode: Literal["ssp"]
    """Which mode."""
    s: int = Field(ge=0)
    """Batches. 0: in lock-step. Higher: less waiting, staler gradients."""


class SoftsyncConsistency(Spec):
    """One step on the mean of any n // `s` gradients, n being the live workers. Nobody waits."""

    mode: Literal["softsync"]
    """Which mode."""
    s: int = Field(ge=1)
    """About the mean staleness, at most as many as workers. n: like `async`. 1: a step holds n gradients."""


class RingmasterConsistency(_Late):
    """As `async`, but a gradient `r` or more versions old is refused."""

    mode: Literal["ringmaster"]
    """Which mode."""
    r: int = Field(ge=1)
    """Versions. 1: no staleness at all. Higher: less is refused, and the rate must be lower."""


class RennalaConsistency(_Late):
    """One step on the mean of `s` gradients of exactly the present version, whoever computed them. Nobody waits."""

    mode: Literal["rennala"]
    """Which mode."""
    s: int = Field(ge=1)
    """Gradients in a step. Higher: steadier steps, fewer of them."""


class MaleniaConsistency(_Late):
    """As `rennala`, but every worker counts alike: one step on the mean of the workers' means.

    A step is made once every live worker was heard and the mean of 1 / (gradients of a worker) is at most n / `s`.
    """

    mode: Literal["malenia"]
    """Which mode."""
    s: int = Field(ge=1)
    """Gradients in a step, were all workers equally fast. Higher: steadier steps, fewer of them."""


class RingleaderConsistency(Spec):
    """A table of each worker's gradients: once all are in it, n steps, each on the mean of the workers' means.

    During those steps each worker's next gradient joins the table; what comes beyond waits for the next table.
    """

    mode: Literal["ringleader"]
    """Which mode."""


class BufferedConsistency(Spec):
    """One step on the mean of `k` gradients, each weighted by 1/√(1 + staleness). Nobody waits."""

    mode: Literal["buffered"]
    """Which mode."""
    k: int = Field(ge=1)
    """Gradients in a step. Higher: steadier steps, fewer of them."""


class LocalConsistency(Spec):
    """A worker takes `h` steps of its own and pushes how far it went; `optimizer` takes that for a gradient.

    With `lr: 1` a server takes the worker's way as it is; `lr: 0.7, momentum: 0.9, nesterov: true` is DiLoCo's.
    """

    mode: Literal["local"]
    """Which mode."""
    h: int = Field(ge=1)
    """Mini-batches of `data.batch_size` in a push. Higher: fewer pushes, and workers drift apart."""
    lr: float = Field(gt=0)
    """The workers' own rate, of plain SGD."""
    synchronous: bool = False
    """Whether a step is made of one push of each worker, as in `bsp`, or of each push, as in `async`."""


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
