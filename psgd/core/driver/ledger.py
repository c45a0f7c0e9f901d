"""The ledger: which batches of an epoch are pending, leased, in doubt or done.

The ledger believes the servers and no worker. When a lease closes, for whatever reason, its batches are *in doubt*
until every partition has sent a report that was requested after the closing. Then a batch that all partitions contain
is done, and a batch that any of them lacks is leased again. A server refuses a batch that it contains already, so
leasing a batch twice only costs time.

One counter numbers both the requests for reports and the closings of leases. These numbers, called *stamps*, show
whether a report was requested after a lease closed.

A *suspect* is a batch that may have killed its worker. It is leased by itself.

A partition that was restored contains fewer batches than before, and may even lack a part of the previous epoch. Then
that epoch starts again. The other partitions keep their batches and refuse repeated ones.
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

WINDOW = 1024  # least number of positions that are searched at once


@dataclass(slots=True)
class _Closed:
    """A closed lease whose batches are in doubt."""

    positions: Positions
    stamp: int  # stamp of its closing
    unreported: frozenset[int]  # partitions that have not reported since


class Settled(NamedTuple):
    """A closed lease whose batches are no longer in doubt."""

    lease: int
    lost: Positions  # its batches that a partition lacks, in the order of work; they are leased again


class Ledger:
    """The record of one epoch's batches, which names them by their position in the epoch.

    Args:
        grid: number of batches by shard.
        partitions: number of servers; a batch is done when all of them contain it.

    Attributes:
        epoch: the open epoch.
        done: number of its batches that every partition contains or skips.
        requeued: number of batches, over all epochs, that were leased, did not arrive and were leased again.
        shared: ids of the leases whose last batches were leased to other workers, too.
    """

    def __init__(self, grid: EpochGrid, partitions: int = 1) -> None:
        self._grid = grid
        self._partitions = partitions
        self._stamp = 0
        self._next_lease = 0
        self._active: dict[int, Positions] = {}  # lease at work -> its batches
        self._closed: dict[int, _Closed] = {}
        self.requeued = 0
        self._reset(0)

    def _reset(self, epoch: int) -> None:
        self.epoch = epoch
        self._contained = np.zeros((self._partitions, self._grid.num_batches), np.bool_)
        self._done = np.zeros(self._grid.num_batches, np.bool_)
        self._pending = np.ones(self._grid.num_batches, np.bool_)  # neither done nor leased nor in doubt
        self._taken_over = np.zeros(self._grid.num_batches, np.bool_)  # on a second lease
        self.shared: set[int] = set()
        self._isolated: list[int] = []  # suspects, to be leased one by one; not in `_pending`
        self._withheld: set[int] = set()  # skipped batches; never pending
        self._first = 0  # no batch before this position is in `_pending`
        self._count()

    def _count(self) -> None:
        self.done = int(np.count_nonzero(self._done))
        self._num_pending = int(np.count_nonzero(self._pending))

    @property
    def pending(self) -> int:
        """Return the number of batches that are neither done nor leased nor in doubt."""
        return self._num_pending + len(self._isolated)

    @property
    def outstanding(self) -> int:
        """Return the number of batches that are leased or in doubt and not reported as done."""
        return self._grid.num_batches - self.done - self.pending

    @property
    def complete(self) -> bool:
        """Return True if every partition contains or skips each batch of the epoch."""
        return self.done == self._grid.num_batches

    def start_epoch(self, epoch: int) -> None:
        """Start another epoch: the next one, or an earlier one that a restored partition lacks."""
        # Leases at work keep their ids until they close, but lose their batches, because these belong to another epoch.
        # If that epoch is reopened, the batches are leased again.
        self._active = {lease: np.empty(0, np.int64) for lease in self._active}
        self._closed = {}
        self._reset(epoch)

    def grant(self, batches: int, home: Fraction = Fraction(0)) -> Lease | None:
        """Lease up to `batches` pending batches, in order, beginning with the worker's own part of the data.

        A suspect is leased first, and by itself.

        Args:
            batches: largest number of batches in the lease.
            home: place in the data at which the worker's own part begins, from 0 (the first shard) to 1 (the end).

        Returns:
            The lease, or None if nothing is pending.
        """
        if self._isolated and batches:
            return self._lease(np.array([self._isolated.pop(0)], np.int64))
        shards = self._grid.batches_per_shard
        start = self._grid.shard_start(int(home * len(shards)))
        own = self._first_pending(start, self._grid.num_batches, batches)
        return self._lease(np.concatenate([own, self._first_pending(0, start, batches - len(own))]))

    def _first_pending(self, start: int, stop: int, batches: int) -> Positions:
        """Return the first pending positions of a range, at most `batches`. Search in pieces: epochs are long."""
        if start <= self._first:
            start = self._first = self._first + int(self._pending[self._first :].argmax())
        found: list[Positions] = []
        piece = max(WINDOW, 2 * batches)
        while batches > 0 and start < stop:
            start += int(self._pending[start:stop].argmax())  # adds 0 if none is pending: `found_here` is empty then
            found_here = np.flatnonzero(self._pending[start : min(start + piece, stop)])[:batches] + start
            if not len(found_here):
                break
            found.append(found_here)
            batches -= len(found_here)
            start += piece
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def grant_striped(self, workers: int, rounds: int) -> tuple[Lease, ...]:
        """Lease the next `rounds` · N pending batches to N workers: to worker i the i-th one and every N-th after it.

        The r-th batch of every worker then belongs to round r, however fast the workers are. So each bulk synchronous
        step consists of the same batches in every run.
        """
        block = self._first_pending(0, self._grid.num_batches, rounds * workers)
        leases = [self._lease(block[worker::workers]) for worker in range(workers)]
        return tuple(lease for lease in leases if lease is not None)

    def _lease(self, positions: Positions) -> Lease | None:
        """Lease some batches. Return None if there are none."""
        if not len(positions):
            return None
        self._num_pending -= int(np.count_nonzero(self._pending[positions]))  # others are leased a second time
        self._pending[positions] = False
        self._active[self._next_lease] = positions
        self._next_lease += 1
        return Lease(self._next_lease - 1, _ranges(self.epoch, positions))

    def left(self, lease: int) -> int:
        """Return the number of batches that the worker of a lease still has to do: neither done nor taken over."""
        positions = self._active[lease]
        return int(np.count_nonzero(~self._done[positions] & ~self._taken_over[positions]))

    def is_done(self, lease: int) -> bool:
        """Return True if all batches of a lease at work are done, by any worker."""
        return bool(self._done[self._active[lease]].all())

    def take_over(self, lease: int, batches: int) -> Lease | None:
        """Lease the last batches of another lease a second time, to another worker.

        The first worker continues from the front. The servers refuse the second push of a batch.

        Args:
            lease: lease at work.
            batches: largest number of batches to take over.

        Returns:
            The second lease, or None if no batch is left to take over.
        """
        positions = self._active[lease]
        left = positions[~self._done[positions] & ~self._taken_over[positions]]
        taken = left[max(0, len(left) - batches) :]
        self._taken_over[taken] = True
        self.shared.add(lease)
        return self._lease(taken)

    def close(self, lease: int) -> None:
        """Close a lease at work, for whatever reason. Its batches are in doubt from now on."""
        assert lease in self._active, f"lease {lease} is not at work: it was closed before, or never granted"
        self._stamp += 1
        self._closed[lease] = _Closed(self._active.pop(lease), self._stamp, frozenset(range(self._partitions)))

    def in_doubt(self, lease: int) -> bool:
        """Return True if a lease is closed and not settled."""
        return lease in self._closed

    def withhold(self, position: int) -> None:
        """Never lease a batch again in this epoch."""
        self._withheld.add(position)
        self._pending[position] = False
        self._isolated = [other for other in self._isolated if other != position]
        self._count()

    def isolate(self, position: int) -> None:
        """Lease a batch by itself from now on, unless it is done or on lease."""
        if self._pending[position]:
            self._pending[position] = False
            self._isolated.append(position)
            self._count()

    def next_stamp(self) -> int:
        """Return the stamp of a report that is requested now."""
        self._stamp += 1
        return self._stamp

    def reported(self, report: Report, asked: int) -> list[Settled]:
        """Note the batches that a partition contains. Return the leases that this settles.

        Args:
            report: report of the partition.
            asked: stamp of the request for the report.
        """
        self._contained[report.partition] = self._bitmap(report)
        before = self._done
        self._done = self._contained[0].copy() if self._partitions == 1 else np.logical_and.reduce(self._contained)
        self._pending &= ~self._done
        self._isolated = [position for position in self._isolated if not self._done[position]]
        settled = [self._settle(lease) for lease in self._settled_by(report.partition, asked)]
        if (undone := before & ~self._done).any():  # the partition was restored
            self._recall(np.flatnonzero(undone))
        self._count()
        return settled

    def _settled_by(self, partition: int, asked: int) -> list[int]:
        """Return the leases that wait for no further report after this one."""
        for closed in self._closed.values():
            if closed.stamp <= asked:
                closed.unreported -= {partition}
        return [lease for lease, closed in self._closed.items() if not closed.unreported]

    def _settle(self, lease: int) -> Settled:
        positions = self._closed.pop(lease).positions
        lost = positions[~self._done[positions]]
        self._recall(lost)
        return Settled(lease, lost)

    def _recall(self, positions: Positions) -> None:
        """Make batches pending again, unless another lease still has them or they are withheld."""
        if not len(positions):
            return
        others = [*self._active.values(), *(closed.positions for closed in self._closed.values())]
        if others:
            positions = positions[~np.isin(positions, np.concatenate(others))]
        self._taken_over[positions] = False
        if self._withheld:
            positions = np.array([position for position in positions if position not in self._withheld], np.int64)
        self._pending[positions] = True
        self._first = 0
        self.requeued += len(positions)

    def _bitmap(self, report: Report) -> Bitmap:
        """Return the batches of the open epoch that the reporting partition contains or skips."""
        if report.epochs > self.epoch:
            return np.ones(self._grid.num_batches, np.bool_)
        return report.settled.get(self.epoch, np.zeros(self._grid.num_batches, np.bool_))

    @property
    def suspects(self) -> int:
        """Return the number of batches that wait to be leased by themselves."""
        return len(self._isolated)

    @property
    def newest_lease(self) -> int:
        """Return the id of the newest lease; -1 if there was none."""
        return self._next_lease - 1

    @property
    def open_leases(self) -> int:
        """Return the number of leases that are at work or in doubt."""
        return len(self._active) + len(self._closed)

    @property
    def settled(self) -> bool:
        """Return True if no lease is at work or in doubt."""
        return not self.open_leases

    @property
    def newest_doubt(self) -> int:
        """Return the stamp of the newest closing that is not settled; 0 if no batch is in doubt."""
        return next((closed.stamp for closed in reversed(self._closed.values())), 0)


def _ranges(epoch: int, positions: Positions) -> tuple[BatchRange, ...]:
    """Return `positions` as ranges of constant step, in their order; each range is as long as possible."""
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
