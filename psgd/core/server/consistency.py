"""Consistency modes: which gradients are admitted, when they become a step, and which workers wait for that step.

A *round* is the set of gradients that become one step. The server collects gradients into the open round, and the mode
decides when it closes. A worker waits as long as it has no receipt for its push; a mode therefore makes workers wait
only by holding back receipts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Any, Protocol

from psgd.core.server.aggregators import Aggregator, OneGradient, RoundMean, RunningMean
from psgd.core.server.live_worker import LiveWorker
from psgd.core.server.tables import RingleaderTables, TableMean
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
    """The open round of a server, from which a mode decides."""

    collected: int = 0  # gradients that are in no step yet
    pushed: set[str] = field(default_factory=set)  # workers with a push for this round, whatever its outcome
    live: dict[str, LiveWorker] = field(default_factory=dict)  # workers that have joined
    outstanding: bool = False  # True while an epoch has begun and some of its batches are not settled

    @property
    def slowest_clock(self) -> int:
        """Return the lowest clock of the live workers; 0 if there are none."""
        return min((worker.clock for worker in self.live.values()), default=0)

    def level_clocks(self) -> None:
        """Give all live workers the highest clock of them."""
        highest = max((worker.clock for worker in self.live.values()), default=0)
        for worker in self.live.values():
            worker.clock = highest


class Consistency(Protocol):
    """Interface of the consistency modes of a server. Except `aggregator`, no method changes anything."""

    steps_alone: bool  # True if every admitted gradient is a step of its own, and no receipt is ever held back

    def aggregator(self, size: int, trainable: int) -> Aggregator:
        """Build the aggregator that collects the rounds of this mode.

        Args:
            size: number of values of the partition.
            trainable: number of them before the first buffer.
        """

    def admits(self, staleness: int) -> bool:
        """Return True if a gradient of this staleness may enter the round."""

    def weight(self, staleness: int) -> float:
        """Return the weight of a gradient of this staleness in the mean; 1 is the full weight."""

    def belongs(self, outcome: Outcome) -> bool:
        """Return True if a push with this outcome belongs to the open round, so that its worker has taken part."""

    def closes(self, round_: Round) -> bool:
        """Return True if the collected gradients become a step now. Called after every push, leave and skip."""

    def waiting(self, round_: Round) -> Callable[[str], bool]:
        """Return a function that returns True for the name of a worker whose receipt is held back."""

    def batches_per_update(self, workers: int) -> int:
        """Return the number of batches in one step, or a lower bound if it varies."""

    def in_lockstep(self, workers: int) -> bool:
        """Return True if a step takes one batch of each worker. Leases are then striped, so that rounds never vary."""


def _no_worker(worker: str) -> bool:
    return False


class Async:
    """w ← w - η·g on every push (Downpour SGD; Dean et al., 2012)."""

    steps_alone = True

    def aggregator(self, size: int, trainable: int) -> Aggregator:
        """Build an aggregator for rounds of one gradient."""
        return OneGradient(size, trainable)

    def admits(self, staleness: int) -> bool:
        """Return True: any staleness is admitted."""
        return True

    def weight(self, staleness: int) -> float:
        """Return 1: every gradient has the full weight."""
        return 1.0

    def belongs(self, outcome: Outcome) -> bool:
        """Return False: no worker takes part in a round that is still open."""
        return False

    def closes(self, round_: Round) -> bool:
        """Return True as soon as there is a gradient."""
        return round_.collected > 0

    def waiting(self, round_: Round) -> Callable[[str], bool]:
        """Hold back no receipt."""
        return _no_worker

    def batches_per_update(self, workers: int) -> int:
        """Return 1."""
        return 1

    def in_lockstep(self, workers: int) -> bool:
        """Return False: a step takes the batch of any worker."""
        return False


class Ssp(Async):
    """Stale synchronous parallel (Ho et al., 2013).

    A worker that has pushed c batches starts the next one only once every live worker has pushed at least c - s.

    Args:
        s: number of batches that a worker may be ahead of the slowest one. Higher → less waiting, more staleness.
    """

    steps_alone = False

    def __init__(self, s: int) -> None:
        self._s = s

    def waiting(self, round_: Round) -> Callable[[str], bool]:
        """Hold back workers that are more than `s` batches ahead of the slowest one, unless the epoch is complete."""
        if not round_.outstanding or not round_.live:
            return _no_worker
        limit = round_.slowest_clock + self._s
        live = round_.live
        return lambda worker: worker in live and live[worker].clock > limit


class Ringmaster(Async):
    """Ringmaster ASGD (Maranjyan, 2025): one step on every gradient whose staleness is below `r`.

    A worker whose gradient is refused starts again from the present weights.

    Args:
        r: smallest staleness that is refused. Lower → fewer stale steps, more computations wasted.
    """

    def __init__(self, r: int) -> None:
        self._r = r

    def admits(self, staleness: int) -> bool:
        """Return True if the staleness is below `r`."""
        return staleness < self._r


class Collecting(Async):
    """One step on the weighted mean of a given number of gradients, of any workers; no worker waits.

    Args:
        size: function from the number of live workers to the number of gradients in a step.
        weight: function from a gradient's staleness to its weight in the mean.
        fresh: True to admit only gradients that were computed from the present version.
    """

    steps_alone = False

    def __init__(
        self, size: Callable[[int], int], weight: Callable[[int], float] = lambda _: 1.0, fresh: bool = False
    ) -> None:
        self._size = size
        self._weight = weight
        self._fresh = fresh

    def aggregator(self, size: int, trainable: int) -> Aggregator:
        """Build a running mean, which needs one vector for any number of gradients."""
        return RunningMean(size, trainable)

    def admits(self, staleness: int) -> bool:
        """Return True for any staleness, or only for 0 if the mode takes fresh gradients only."""
        return staleness == 0 or not self._fresh

    def weight(self, staleness: int) -> float:
        """Return the weight that the mode gives to this staleness."""
        return self._weight(staleness)

    def closes(self, round_: Round) -> bool:
        """Return True if enough gradients are collected, or the epoch is complete and some are left."""
        enough = round_.collected >= self._size(len(round_.live))
        return round_.collected > 0 and (enough or not round_.outstanding)

    def batches_per_update(self, workers: int) -> int:
        """Return the number of gradients in a step."""
        return self._size(workers)


class LockStep(Async):
    """One step on the mean of the first gradients of the present version; their workers wait for the step.

    w ← w - η · Σ nᵢgᵢ / Σ nᵢ over the round, in BatchId order (Chen et al., 2016; Dutta et al., 2018), where nᵢ is the
    number of examples of gradient gᵢ.

    Args:
        size: function from the number of live workers to the number of gradients in a step. None: one of each worker
            (bulk synchronous).
    """

    steps_alone = False

    def __init__(self, size: Callable[[int], int] | None = None) -> None:
        self._size = size

    def aggregator(self, size: int, trainable: int) -> Aggregator:
        """Build an aggregator that keeps the gradients of a round and sums them in BatchId order."""
        return RoundMean(size, trainable)

    def admits(self, staleness: int) -> bool:
        """Return True only for a gradient of the weights that the step starts from."""
        return staleness == 0

    def belongs(self, outcome: Outcome) -> bool:
        """Return True, except for a push that came too late for a round of limited size.

        The worker of such a push gets its receipt at once, and its next gradient may still enter the open round.
        """
        return self._size is None or outcome not in (Outcome.REQUEUED, Outcome.DISCARDED)

    def closes(self, round_: Round) -> bool:
        """Return True if enough gradients are collected, every live worker has pushed, or the epoch is complete."""
        enough = self._size is not None and round_.collected >= max(1, self._size(len(round_.live)))
        return bool(round_.pushed) and (enough or round_.live.keys() <= round_.pushed or not round_.outstanding)

    def waiting(self, round_: Round) -> Callable[[str], bool]:
        """Hold back the workers that have pushed into the open round."""
        return round_.pushed.__contains__

    def batches_per_update(self, workers: int) -> int:
        """Return the number of gradients in a step; without a limit, the number of workers."""
        return workers if self._size is None else max(1, self._size(workers))

    def in_lockstep(self, workers: int) -> bool:
        """Return True if a step waits for all workers."""
        return self.batches_per_update(workers) >= workers


class Malenia(Collecting):
    """Malenia SGD (Tyurin and Richtárik, 2023): one step on the mean of the workers' means of the present version.

    A round closes once every one of the n live workers has Bᵢ ≥ 1 gradients in it and (1/n) Σ 1/Bᵢ ≤ n/S. Workers that
    left are not in this sum: their Bᵢ cannot grow any more, and would keep the round open.

    Args:
        s: S of the formula. Higher → more gradients in a step.
    """

    def __init__(self, s: int) -> None:
        super().__init__(lambda _: s, fresh=True)
        self._s = s
        self._means: TableMean | None = None

    def aggregator(self, size: int, trainable: int) -> Aggregator:
        """Build an aggregator that keeps a sum for each worker."""
        self._means = TableMean(size, trainable)
        return self._means

    def closes(self, round_: Round) -> bool:
        """Return True if the condition above holds, or the epoch is complete and gradients are left."""
        assert self._means is not None
        if not round_.collected or not round_.outstanding:
            return round_.collected > 0
        counts = self._means.table.counts
        live = round_.live.keys()
        return live <= counts.keys() and sum(1 / counts[worker] for worker in live) * self._s <= len(live) ** 2


class Ringleader(Async):
    """Ringleader ASGD (Maranjyan and Richtárik, 2026): n steps on each table of the n workers' mean gradients."""

    steps_alone = False

    def __init__(self) -> None:
        self._tables: RingleaderTables | None = None

    def aggregator(self, size: int, trainable: int) -> Aggregator:
        """Build the two tables."""
        self._tables = RingleaderTables(size, trainable)
        return self._tables

    def closes(self, round_: Round) -> bool:
        """Return True if a step on the table is due, or the epoch is complete and gradients are left."""
        assert self._tables is not None
        return self._tables.owes_step() or (round_.collected > 0 and not round_.outstanding)


def _buffered_weight(staleness: int) -> float:
    return 1 / sqrt(1 + staleness)


def build_consistency(spec: ConsistencySpec) -> Consistency:
    """Build the consistency mode of a job."""
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
