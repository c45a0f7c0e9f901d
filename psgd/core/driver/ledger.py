"""The ledger: what is left to do in an epoch, who has it on lease, and what is in doubt.

Workers are never believed. A lease that closed, however it closed, leaves its batches *in doubt* until every partition
has reported since: what all of them contain is done, what any of them lacks is leased again. The servers refuse what
they contain already, so leasing a batch twice costs time and nothing else.

An order of asking and closing is kept as a *stamp*, a counter: a report settles the leases whose closing came before
its asking.

A partition that was restored contains less than before, perhaps not even the whole of the epoch before: then that epoch
is turned to again. What the other partitions contain stays; they refuse what comes twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from psgd.core.server.applied import Bitmap
from psgd.core.server.report import Report
from psgd_workers.messages import BatchRange, EpochGrid, Lease

__all__ = ["Ledger", "Settled"]

Positions = NDArray[np.int64]

WINDOW = 1024  # positions looked at together


@dataclass(slots=True)
class _Closed:
    """A lease that is closed, its batches in doubt."""

    positions: Positions
    closed: int  # stamp
    lacking: frozenset[int]  # partitions that have not reported since


class Settled(NamedTuple):
    """A closed lease whose batches are in doubt no more."""

    lease: int
    lost: Positions  # those that some partition lacks, in the order of work; they are leased again


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
        self._out: dict[int, Positions] = {}  # leases at work
        self._closed: dict[int, _Closed] = {}
        self.requeued = 0  # batches that were leased, did not arrive, and went back
        self._begin(0)

    def _begin(self, epoch: int) -> None:
        self.epoch = epoch
        self._contains = np.zeros((self._partitions, self._grid.num_batches), np.bool_)
        self._done = np.zeros(self._grid.num_batches, np.bool_)
        self._pending = np.ones(self._grid.num_batches, np.bool_)  # neither done nor leased
        self._taken_over = np.zeros(self._grid.num_batches, np.bool_)  # out on a second lease
        self.overtaken: set[int] = set()  # leases whose last batches others were given too
        self._alone: list[int] = []  # suspects, each to be leased by itself; not pending
        self._withheld: set[int] = set()  # to be done without; never pending
        self._count()

    def _count(self) -> None:
        self.done = int(np.count_nonzero(self._done))
        self.pending = int(np.count_nonzero(self._pending)) + len(self._alone)

    @property
    def outstanding(self) -> int:
        """Batches leased or in doubt, as far as reported."""
        return self._grid.num_batches - self.done - self.pending

    @property
    def complete(self) -> bool:
        """Whether every partition contains the whole epoch."""
        return self.done == self._grid.num_batches

    def advance(self, epoch: int) -> None:
        """Turn to another epoch: the next one, or back to one that a restored partition does not contain."""
        # What of the present epoch is out or in doubt and not done will be leased again when its turn comes back.
        self._out = {lease: np.empty(0, np.int64) for lease in self._out}
        self._closed = {}
        self._begin(epoch)

    def grant(self, batches: int, home: Fraction = Fraction(0)) -> Lease | None:
        """Lease up to `batches` pending batches, in order, beginning with the worker's own part of the data.

        A suspect is leased first, and by itself.

        Args:
            batches: at most so many.
            home: where the worker's own shards begin, as a share of all shards.

        Returns:
            The lease, or None if nothing is pending.
        """
        if self._alone and batches:
            return self._lease(np.array([self._alone.pop(0)], np.int64))
        shards = self._grid.batches_per_shard
        start = self._grid.shard_start(int(home * len(shards)))
        own = self._first(start, self._grid.num_batches, batches)
        return self._lease(np.concatenate([own, self._first(0, start, batches - len(own))]))

    def _first(self, start: int, stop: int, batches: int) -> Positions:
        """Up to so many pending positions of a range, the first ones; looked for piece by piece, as epochs are long."""
        found: list[Positions] = []
        piece = max(WINDOW, 2 * batches)
        while batches > 0 and start < stop:
            start += int(self._pending[start:stop].argmax())  # 0 if there is none: then the piece is empty
            part = np.flatnonzero(self._pending[start : min(start + piece, stop)])[:batches] + start
            if not len(part):
                break
            found.append(part)
            batches -= len(part)
            start += piece
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def grant_striped(self, workers: int, rounds: int) -> tuple[Lease, ...]:
        """Lease the next `rounds` · N pending batches so that worker i of N gets every N-th, from the i-th on.

        Worker i's r-th batch then belongs to round r, whoever is fast: bulk synchronous steps are made of the same
        batches in every run.
        """
        block = self._first(0, self._grid.num_batches, rounds * workers)
        leases = [self._lease(block[worker::workers]) for worker in range(workers)]
        return tuple(lease for lease in leases if lease is not None)

    def _lease(self, positions: Positions) -> Lease | None:
        if not len(positions):
            return None
        self._pending[positions] = False
        self._count()
        self._out[self._next_lease] = positions
        self._next_lease += 1
        return Lease(self._next_lease - 1, _ranges(self.epoch, positions))

    def left(self, lease: int) -> int:
        """Batches of a lease at work that are not done and not taken over, as far as reported."""
        positions = self._out[lease]
        return int(np.count_nonzero(~self._done[positions] & ~self._taken_over[positions]))

    def is_done(self, lease: int) -> bool:
        """Whether all batches of a lease at work are done, by whomever."""
        return bool(self._done[self._out[lease]].all())

    def take_over(self, lease: int, batches: int) -> Lease | None:
        """Lease the last `batches` of what is left of another lease a second time.

        Its worker goes on from the front; the servers refuse whichever push of a batch comes second.
        """
        positions = self._out[lease]
        left = positions[~self._done[positions] & ~self._taken_over[positions]]
        taken = left[len(left) - batches :] if batches else left[:0]
        self._taken_over[taken] = True
        self.overtaken.add(lease)
        return self._lease(taken)

    def close(self, lease: int) -> None:
        """A lease returned, failed, or its worker is gone: its batches are in doubt."""
        assert lease in self._out, f"lease {lease} is closed already, or never was"
        self._stamp += 1
        self._closed[lease] = _Closed(self._out.pop(lease), self._stamp, frozenset(range(self._partitions)))

    def in_doubt(self, lease: int) -> bool:
        """Whether a lease is closed and not settled."""
        return lease in self._closed

    def withhold(self, position: int) -> None:
        """Never lease a batch again in this epoch."""
        self._withheld.add(position)
        self._pending[position] = False
        self._alone = [other for other in self._alone if other != position]
        self._count()

    def isolate(self, position: int) -> None:
        """Lease a batch by itself from now on, if it has to be leased."""
        if self._pending[position]:
            self._pending[position] = False
            self._alone.append(position)
            self._count()

    def ask(self) -> int:
        """The stamp of a report that is asked for now."""
        self._stamp += 1
        return self._stamp

    def reported(self, report: Report, asked: int) -> list[Settled]:
        """Take in what a partition contains, and settle what was closed before it was `asked`."""
        self._contains[report.partition] = self._bitmap(report)
        before = self._done
        self._done = self._contains[0].copy() if self._partitions == 1 else np.logical_and.reduce(self._contains)
        self._pending &= ~self._done
        self._alone = [position for position in self._alone if not self._done[position]]
        settled = [self._settle(lease) for lease in self._settled_by(report.partition, asked)]
        if (undone := before & ~self._done).any():  # the partition was restored
            self._recall(np.flatnonzero(undone))
        self._count()
        return settled

    def _settled_by(self, partition: int, asked: int) -> list[int]:
        """The leases that no report is missing of after this one."""
        for out in self._closed.values():
            if out.closed <= asked:
                out.lacking -= {partition}
        return [lease for lease, out in self._closed.items() if not out.lacking]

    def _settle(self, lease: int) -> Settled:
        positions = self._closed.pop(lease).positions
        lost = positions[~self._done[positions]]
        self._recall(lost)
        return Settled(lease, lost)

    def _recall(self, positions: Positions) -> None:
        """Lease again what is not done, unless another lease has it still."""
        if not len(positions):
            return
        others = [*self._out.values(), *(out.positions for out in self._closed.values())]
        if others:
            positions = positions[~np.isin(positions, np.concatenate(others))]
        self._taken_over[positions] = False
        if self._withheld:
            positions = np.array([position for position in positions if position not in self._withheld], np.int64)
        self._pending[positions] = True
        self.requeued += len(positions)

    def _bitmap(self, report: Report) -> Bitmap:
        if report.epochs > self.epoch:
            return np.ones(self._grid.num_batches, np.bool_)
        return report.settled.get(self.epoch, np.zeros(self._grid.num_batches, np.bool_))

    @property
    def suspects(self) -> int:
        """Batches that are to be leased by themselves."""
        return len(self._alone)

    @property
    def newest_lease(self) -> int:
        """The highest id of a lease so far; -1: there was none."""
        return self._next_lease - 1

    @property
    def open_leases(self) -> int:
        """Leases that are out or in doubt."""
        return len(self._out) + len(self._closed)

    @property
    def settled(self) -> bool:
        """Whether nothing is out and nothing is in doubt."""
        return not self.open_leases

    @property
    def newest_doubt(self) -> int:
        """The stamp of the newest closing that is not settled; 0 if nothing is in doubt."""
        return next((out.closed for out in reversed(self._closed.values())), 0)


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
