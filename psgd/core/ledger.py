"""The ledger: what is left to do in an epoch, who has it on lease, and what is in doubt.

Workers are never believed. A lease that closed, however it closed, leaves its batches *in doubt* until every partition
has reported since: what all of them contain is done, what any of them lacks is leased again. The servers refuse what
they contain already, so leasing a batch twice costs time and nothing else.

An order of asking and closing is kept as a *stamp*, a counter: a report settles the leases whose closing came before
its asking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from psgd.core.applied import Bitmap
from psgd.core.report import Report
from psgd_workers.messages import BatchRange, EpochGrid, Lease

__all__ = ["Ledger"]

Positions = NDArray[np.int64]


@dataclass(slots=True)
class _Out:
    """A lease that is out, or closed and in doubt."""

    worker: str
    positions: Positions
    closed: int | None = None  # stamp
    lacking: frozenset[int] = frozenset()  # partitions that have not reported since


class Ledger:
    """One epoch at a time.

    Args:
        grid: the shape of an epoch.
        partitions: how many servers must contain a batch before it is done.
    """

    def __init__(self, grid: EpochGrid, partitions: int = 1) -> None:
        self._grid = grid
        self._partitions = partitions
        self._stamp = 0
        self._next_lease = 0
        self._out: dict[int, _Out] = {}
        self.requeued = 0  # batches that were leased, did not arrive, and went back
        self._begin(0)

    def _begin(self, epoch: int) -> None:
        self.epoch = epoch
        self._contains = np.zeros((self._partitions, self._grid.num_batches), np.bool_)
        self._leased = np.zeros(self._grid.num_batches, np.bool_)

    @property
    def _done(self) -> Bitmap:
        done: Bitmap = np.logical_and.reduce(self._contains, axis=0)
        return done

    @property
    def _pending(self) -> Positions:
        return np.flatnonzero(~self._leased & ~self._done)

    @property
    def pending(self) -> int:
        """Batches of the epoch that nobody has and some partition lacks."""
        return len(self._pending)

    @property
    def done(self) -> int:
        """Batches of the epoch that every partition contains, as far as reported."""
        return int(self._done.sum())

    @property
    def outstanding(self) -> int:
        """Batches leased or in doubt, as far as reported."""
        return int((self._leased & ~self._done).sum())

    @property
    def complete(self) -> bool:
        """Whether every partition contains the whole epoch."""
        return bool(self._contains.all())

    def advance(self, epoch: int) -> None:
        """Turn to another epoch, the present one being complete."""
        self._out = {lease: out for lease, out in self._out.items() if out.closed is None}
        for out in self._out.values():
            out.positions = np.empty(0, np.int64)  # all done; only the call itself has yet to return
        self._begin(epoch)

    def grant(self, worker: str, batches: int, home: Fraction = Fraction(0)) -> Lease | None:
        """Lease up to `batches` pending batches, in order, beginning with a worker's own part of the data.

        Args:
            worker: who gets them.
            batches: at most so many.
            home: where the worker's own shards begin, as a share of all shards.

        Returns:
            The lease, or None if nothing is pending.
        """
        shards = self._grid.batches_per_shard
        start = self._grid.shard_start(int(home * len(shards)))
        pending = self._pending
        own_first = np.concatenate([pending[pending >= start], pending[pending < start]])
        return self._lease(worker, own_first[:batches])

    def grant_striped(self, workers: Sequence[str], rounds: int) -> tuple[Lease, ...]:
        """Lease the next `rounds` · N pending batches so that worker i of N gets every N-th, from the i-th on.

        Worker i's r-th batch then belongs to round r, whoever is fast: bulk synchronous steps are made of the same
        batches in every run.
        """
        block = self._pending[: rounds * len(workers)]
        leases = [self._lease(worker, block[i :: len(workers)]) for i, worker in enumerate(workers)]
        return tuple(lease for lease in leases if lease is not None)

    def _lease(self, worker: str, positions: Positions) -> Lease | None:
        if not len(positions):
            return None
        self._leased[positions] = True
        self._out[self._next_lease] = _Out(worker, positions)
        self._next_lease += 1
        return Lease(self._next_lease - 1, _ranges(self.epoch, positions))

    def close(self, lease: int) -> None:
        """A lease returned, failed, or its worker is gone: its batches are in doubt."""
        out = self._out[lease]
        assert out.closed is None, f"lease {lease} is closed already"
        self._stamp += 1
        out.closed = self._stamp
        out.lacking = frozenset(range(self._partitions))

    def ask(self) -> int:
        """The stamp of a report that is asked for now."""
        self._stamp += 1
        return self._stamp

    def reported(self, report: Report, asked: int) -> None:
        """Take in what a partition contains, and settle what was closed before it was `asked`."""
        self._contains[report.partition] = self._bitmap(report)
        done = self._done
        for lease, out in list(self._out.items()):
            if out.closed is None or out.closed > asked:
                continue
            out.lacking -= {report.partition}
            if not out.lacking:
                del self._out[lease]
                lost = out.positions[~done[out.positions]]
                self._leased[lost] = False
                self.requeued += len(lost)

    def _bitmap(self, report: Report) -> Bitmap:
        if report.epochs > self.epoch:
            return np.ones(self._grid.num_batches, np.bool_)
        return report.settled.get(self.epoch, np.zeros(self._grid.num_batches, np.bool_))

    @property
    def settled(self) -> bool:
        """Whether nothing is out and nothing is in doubt."""
        return not self._out

    @property
    def newest_doubt(self) -> int:
        """The stamp of the newest closing that is not settled; 0 if nothing is in doubt."""
        return max((out.closed or 0 for out in self._out.values()), default=0)


def _ranges(epoch: int, positions: Positions) -> tuple[BatchRange, ...]:
    """The fewest ranges of constant step that a greedy reading of `positions` finds, in their order."""
    ranges: list[BatchRange] = []
    left = positions
    while len(left):
        steps = np.diff(left)
        step = max(1, int(steps[0])) if len(steps) else 1
        breaks = np.flatnonzero(steps != step)
        length = int(breaks[0]) + 1 if len(breaks) else len(left)
        ranges.append(BatchRange(epoch, int(left[0]), int(left[length - 1]) + 1, step))
        left = left[length:]
    return tuple(ranges)
