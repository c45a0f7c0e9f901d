"""Consistency: which gradients are admitted, when they become a step, and who waits for that.

A *round* is what one step is made of. The server collects gradients into it; the mode says when it closes. A worker
waits by not being given its receipt, so a mode decides everything about waiting by saying whose receipts are held back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Any, Protocol

from psgd.core.server.aggregators import Aggregator, OneGradient, RingleaderTables, RoundMean, RunningMean, TableMean
from psgd.spec import (
    AsyncConsistency,
    BackupConsistency,
    BspConsistency,
    BufferedConsistency,
    ConsistencySpec,
    KSyncConsistency,
    LocalConsistency,
    MaleniaConsistency,
    RennalaConsistency,
    RingleaderConsistency,
    RingmasterConsistency,
    SoftsyncConsistency,
    SspConsistency,
)
from psgd_workers.messages import Outcome

__all__ = ["Consistency", "Round", "build_consistency"]


@dataclass(slots=True)
class Round:
    """What a mode decides from."""

    collected: int = 0  # gradients since the last step
    heard: set[str] = field(default_factory=set)  # workers whose push belongs to the open round, whatever became of it
    live: dict[str, int] = field(default_factory=dict)  # workers that hold a lease -> clock: pushes heard
    outstanding: bool = False  # some batch of the epoch is in no state yet


class Consistency(Protocol):
    """One mode."""

    def aggregator(self, size: int, trainable: int) -> Aggregator:
        """What collects a round, for a slice of `size` values of which `trainable` are no buffers."""

    def admits(self, staleness: int) -> bool:
        """Whether a gradient that was read in this server's history may enter the round."""

    def weight(self, staleness: int) -> float:
        """How much a gradient of that staleness counts; 1 is plain."""

    def belongs(self, outcome: Outcome) -> bool:
        """Whether a push with that outcome belongs to the open round, so that its worker is heard in it."""

    def closes(self, round_: Round) -> bool:
        """Whether what is collected becomes a step now. Asked after every push, leave and change."""

    def waiting(self, round_: Round) -> Callable[[str], bool]:
        """Whether a worker's receipt is held back for now, by its name."""

    def batches_per_update(self, workers: int) -> int:
        """Batches that one step takes, as far as that is known beforehand."""

    def in_lockstep(self, workers: int) -> bool:
        """Whether a step takes one batch of each worker: leases can then be striped, so that rounds never vary."""


def _nobody(worker: str) -> bool:
    return False


class Async:
    """w ← w - η·g on every push (Downpour SGD; Dean et al., 2012)."""

    def aggregator(self, size: int, trainable: int) -> Aggregator:
        """One gradient at a time."""
        return OneGradient(size, trainable)

    def admits(self, staleness: int) -> bool:
        """Any staleness."""
        return True

    def weight(self, staleness: int) -> float:
        """All alike."""
        return 1.0

    def belongs(self, outcome: Outcome) -> bool:
        """There is no round to belong to."""
        return False

    def closes(self, round_: Round) -> bool:
        """At once."""
        return round_.collected > 0

    def waiting(self, round_: Round) -> Callable[[str], bool]:
        """Nobody's."""
        return _nobody

    def batches_per_update(self, workers: int) -> int:
        """One."""
        return 1

    def in_lockstep(self, workers: int) -> bool:
        """It does not."""
        return False


class Ssp(Async):
    """Stale synchronous parallel (Ho et al., 2013): a worker starts its c-th batch only if every live one did c - s.

    Args:
        s: how many batches a worker may be ahead of the slowest.
    """

    def __init__(self, s: int) -> None:
        self._s = s

    def waiting(self, round_: Round) -> Callable[[str], bool]:
        """Theirs who are more than `s` ahead, as long as somebody has a batch left to push."""
        if not round_.outstanding or not round_.live:
            return _nobody
        limit = min(round_.live.values()) + self._s
        return lambda worker: round_.live.get(worker, 0) > limit


class Ringmaster(Async):
    """Refuses gradients of staleness `r` and more; the worker restarts from the present weights (Maranjyan, 2025).

    Args:
        r: the staleness that is too much.
    """

    def __init__(self, r: int) -> None:
        self._r = r

    def admits(self, staleness: int) -> bool:
        """Less than `r`."""
        return staleness < self._r


class Collecting(Async):
    """One step on the mean of a number of gradients; nobody waits.

    Args:
        size: live workers -> how many gradients are a step.
        weight: staleness -> how much a gradient counts.
        fresh: whether only gradients of the present version are admitted.
    """

    def __init__(
        self, size: Callable[[int], int], weight: Callable[[int], float] = lambda _: 1.0, fresh: bool = False
    ) -> None:
        self._size = size
        self._weight = weight
        self._fresh = fresh

    def aggregator(self, size: int, trainable: int) -> Aggregator:
        """A running mean: one vector, however many gradients."""
        return RunningMean(size, trainable)

    def admits(self, staleness: int) -> bool:
        """Any staleness, or none at all."""
        return staleness == 0 or not self._fresh

    def weight(self, staleness: int) -> float:
        """As given."""
        return self._weight(staleness)

    def closes(self, round_: Round) -> bool:
        """When there are enough, or nobody has a batch left to push."""
        enough = round_.collected >= self._size(len(round_.live))
        return round_.collected > 0 and (enough or not round_.outstanding)

    def batches_per_update(self, workers: int) -> int:
        """As many as are collected."""
        return self._size(workers)


class LockStep(Async):
    """One step on the mean of the first gradients of the present version; who gave one waits for the step.

    w ← w - η · Σ nᵢgᵢ / Σ nᵢ over the round, in BatchId order (Chen et al., 2016; Dutta et al., 2018).

    Args:
        size: live workers -> how many gradients are a step. None: one of each (bulk synchronous).
    """

    def __init__(self, size: Callable[[int], int] | None = None) -> None:
        self._size = size

    def aggregator(self, size: int, trainable: int) -> Aggregator:
        """The gradients themselves, to be summed in BatchId order."""
        return RoundMean(size, trainable)

    def admits(self, staleness: int) -> bool:
        """Only what was computed from the weights that the step starts from."""
        return staleness == 0

    def belongs(self, outcome: Outcome) -> bool:
        """Everything; but who came too late for the round before is sent on, where others do not wait for it."""
        return self._size is None or outcome not in (Outcome.REQUEUED, Outcome.DISCARDED)

    def closes(self, round_: Round) -> bool:
        """When there are enough, or every live worker was heard, or nobody has a batch left to push."""
        enough = self._size is not None and round_.collected >= max(1, self._size(len(round_.live)))
        return bool(round_.heard) and (enough or round_.live.keys() <= round_.heard or not round_.outstanding)

    def waiting(self, round_: Round) -> Callable[[str], bool]:
        """Theirs who were heard in the open round."""
        return round_.heard.__contains__

    def batches_per_update(self, workers: int) -> int:
        """As many as make a step."""
        return workers if self._size is None else max(1, self._size(workers))

    def in_lockstep(self, workers: int) -> bool:
        """If it waits for all of them."""
        return self.batches_per_update(workers) >= workers


class Malenia(Collecting):
    """One step on the mean of the workers' means, all of the present version (Tyurin and Richtárik, 2023).

    Closes when every live worker has Bᵢ ≥ 1 gradients in it and (1/n) Σ 1/Bᵢ ≤ n/S over those: who has left will bring
    no more, and must not hold the round up.

    Args:
        s: S.
    """

    def __init__(self, s: int) -> None:
        super().__init__(lambda _: s, fresh=True)
        self._s = s
        self._means: TableMean | None = None

    def aggregator(self, size: int, trainable: int) -> Aggregator:
        """A sum for each worker."""
        self._means = TableMean(size, trainable)
        return self._means

    def closes(self, round_: Round) -> bool:
        """See above; or when nobody has a batch left to push."""
        assert self._means is not None
        if not round_.collected or not round_.outstanding:
            return round_.collected > 0
        counts = self._means.table.counts
        live = round_.live.keys()
        return live <= counts.keys() and sum(1 / counts[worker] for worker in live) * self._s <= len(live) ** 2


class Ringleader(Async):
    """A table of each worker's gradients, and n steps on each table (Maranjyan and Richtárik, 2026)."""

    def __init__(self) -> None:
        self._tables: RingleaderTables | None = None

    def aggregator(self, size: int, trainable: int) -> Aggregator:
        """Two tables."""
        self._tables = RingleaderTables(size, trainable)
        return self._tables

    def closes(self, round_: Round) -> bool:
        """When the tables owe a step, or nobody has a batch left to push."""
        assert self._tables is not None
        return self._tables.owes_step() or (round_.collected > 0 and not round_.outstanding)


def _buffered_weight(staleness: int) -> float:
    return 1 / sqrt(1 + staleness)


def build_consistency(spec: ConsistencySpec) -> Consistency:
    """The mode that a job asks for."""
    return _BUILDERS[type(spec)](spec)


_BUILDERS: Mapping[type[Any], Callable[[Any], Consistency]] = {
    AsyncConsistency: lambda spec: Async(),
    BspConsistency: lambda spec: LockStep(),
    KSyncConsistency: lambda spec: LockStep(lambda live: spec.k),
    BackupConsistency: lambda spec: LockStep(lambda live: live - spec.b),
    SspConsistency: lambda spec: Ssp(spec.s),
    SoftsyncConsistency: lambda spec: Collecting(lambda live: max(1, live // spec.s)),
    RingmasterConsistency: lambda spec: Ringmaster(spec.r),
    RennalaConsistency: lambda spec: Collecting(lambda live: spec.s, fresh=spec.traits.fresh_only),
    BufferedConsistency: lambda spec: Collecting(lambda live: spec.k, _buffered_weight),
    LocalConsistency: lambda spec: LockStep() if spec.synchronous else Async(),
    MaleniaConsistency: lambda spec: Malenia(spec.s),
    RingleaderConsistency: lambda spec: Ringleader(),
}
