"""The player: a run's servers once more, and what its workers sent them.

Every server goes through its own journal. A gradient is computed once, from the versions of every partition that its
records name, and each server steps on its slice of it in its own order. So a server may have to wait for another to
come to a version; as each waited for nothing but its past in the run, one of them can always go on, unless records are
missing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from psgd.errors import JournalError
from psgd.job import OpenJob
from psgd.replay.lineage import Record
from psgd.replay.pushes import NONE, Pushes
from psgd.replay.server import Computed, ReplayServer
from psgd_workers.gradients.sender import gradient_norm
from psgd_workers.messages import FloatArray, Version

__all__ = ["Replayer"]


class Replayer:
    """All servers, and what workers sent them.

    Args:
        job: of the run.
        servers: by partition.
        pushes: of their journals.
    """

    def __init__(self, job: OpenJob, servers: Sequence[ReplayServer], pushes: Pushes) -> None:
        self._job = job
        self._servers = servers
        self._pushes = pushes
        self._worker = job.worker("replay")  # computes for all of them: a gradient is a function of batch and weights
        self._made: dict[int, Computed] = {}  # by push, while a server is still to take it
        self._ends: dict[int, tuple[int, FloatArray]] = {}  # partition -> its updates and weights where it stopped
        for push in range(len(pushes)):
            for server, read in zip(servers, pushes.reads(push), strict=True):
                server.expect(read)
        for server in servers:
            server.start()

    def play(self, until: int | None) -> tuple[list[int], FloatArray]:
        """Go through the journals, to their end or until every server made so many updates.

        Returns:
            The updates of each partition there, and the weights.

        Raises:
            JournalError: a gradient cannot be computed, as records are missing.
            ReplayError: at the first record that comes out otherwise.
        """
        while going := self._going(until):
            # A server may need what another does after its end, or cannot do on a branch of which too little is known.
            if not (self._step(going) or self._step(self._servers) or self._give_up()):
                raise JournalError(self._stuck(going))
        weights = np.empty_like(self._job.weights)
        for server in self._servers:
            weights[server.slice] = self._ends[server.number][1]
        return [self._ends[server.number][0] for server in self._servers], weights

    def _going(self, until: int | None) -> list[ReplayServer]:
        """The servers that are not at their end yet."""
        for server in self._servers:
            if server.number in self._ends:
                continue
            if server.on_lineage and until is not None and server.updates >= until:
                self._ends[server.number] = server.updates, server.weights
            elif server.end is not None:
                self._ends[server.number] = server.end
        return [server for server in self._servers if server.number not in self._ends]

    def _step(self, servers: Sequence[ReplayServer]) -> bool:
        """Let one record happen on each of them; return True if any could."""
        moved = [self._again(server, server.next) for server in servers if server.next is not None]
        return any(moved)

    def _again(self, server: ReplayServer, record: Record) -> bool:
        push = self._pushes.number(server.number, server.place)
        if push == NONE:
            server.again(record, None)
            return True
        if not server.knows_remainder(record):
            return False
        computed = self._made.get(push) or self._compute(push, record)
        if computed is None:
            return False
        server.again(record, computed)
        if self._pushes.done(push):
            del self._made[push]
        return True

    def _compute(self, push: int, record: Record) -> Computed | None:
        """Compute a gradient; None: what it was computed from did not come yet."""
        reads = self._pushes.reads(push)
        weights = self._shown(reads)
        if weights is None:
            return None
        values = np.empty_like(self._job.weights)
        loss = self._worker.gradient(record.batch, weights, values)
        norm = gradient_norm(values, self._job.layout.num_trainable)
        computed = self._made[push] = Computed(values, weights, reads, loss, norm)
        self._forget(reads)
        return computed

    def _shown(self, reads: Sequence[Version]) -> FloatArray | None:
        """The weights of those versions; None: one of them did not come yet."""
        slices = [server.shown(read) for server, read in zip(self._servers, reads, strict=True)]
        if len(slices) == 1:
            return slices[0]
        weights = np.empty_like(self._job.weights)
        for server, values in zip(self._servers, slices, strict=True):
            if values is None:
                return None
            weights[server.slice] = values
        return weights

    def _forget(self, reads: Sequence[Version]) -> None:
        for server, read in zip(self._servers, reads, strict=True):
            server.forget(read)

    # What cannot be known

    def _give_up(self) -> bool:
        """Let one server leave a branch that was given up, and of which too little is known; True if there is one."""
        for server in self._servers:
            if server.astray:
                for place in server.give_up():
                    self._drop(self._pushes.number(server.number, place))
                return True
        return False

    def _drop(self, push: int) -> None:
        """Count off a record that is not replayed."""
        if push != NONE and self._pushes.done(push) and self._made.pop(push, None) is None:
            self._forget(self._pushes.reads(push))

    def _stuck(self, servers: Sequence[ReplayServer]) -> str:
        """Say why no server can go on: each has a push before it whose gradient cannot be computed."""
        reasons = [(server, *self._lacks(server, server.next)) for server in servers if server.next]
        server, lacks, _ = next((reason for reason in reasons if reason[2]), reasons[0])
        reached = min(other.updates for other in self._servers)
        return (
            f"{server.told}; {lacks}. A lost server takes along the records since its last checkpoint; if none was "
            f"lost, records are missing or another run's. --until {reached} replays what comes before"
        )

    def _lacks(self, server: ReplayServer, record: Record) -> tuple[str, bool]:
        """Say what a gradient cannot be computed without, and whether that can no longer come."""
        if not server.knows_remainder(record):
            return (
                f"it carries on what compression left out of push {record.carries} of its worker's slot {record.slot}, "
                f"which no record tells of",
                True,
            )
        reads = self._pushes.reads(self._pushes.number(server.number, server.place))
        both = zip(self._servers, reads, strict=True)
        missing = [(other, read) for other, read in both if other.shown(read) is None]
        other, read = next((pair for pair in missing if pair[0].has_passed(pair[1])), missing[0])
        return (
            f"it was computed from version {read.updates} of incarnation {read.incarnation} of server {other.number}, "
            "to which no record leads",
            other.has_passed(read),
        )
