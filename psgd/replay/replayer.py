"""The replayer: replays the journals of all servers of a run together.

Every server replays its own journal, in order. A gradient is computed once, from the version of every partition that
its records name, and each server steps on its own slice of it. A server may therefore have to wait until another one
has reached a version. In the run each record depended only on earlier ones, so one of the servers can always proceed,
unless records are missing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from psgd.errors import JournalError
from psgd.job import OpenJob
from psgd.replay.lineage import Record
from psgd.replay.pushes import NO_PUSH, Pushes
from psgd.replay.server import ComputedGradient, ReplayServer
from psgd_workers.gradients.sender import gradient_norm
from psgd_workers.messages import FloatArray, Version

__all__ = ["Replayer"]


class Replayer:
    """All servers of a run, and the pushes of its workers.

    Args:
        job: job of the run.
        servers: servers by partition.
        pushes: pushes recorded in the servers' journals.
    """

    def __init__(self, job: OpenJob, servers: Sequence[ReplayServer], pushes: Pushes) -> None:
        self._job = job
        self._servers = servers
        self._pushes = pushes
        self._worker = job.worker("replay")  # for all workers: a gradient depends only on batch and weights
        self._computed: dict[int, ComputedGradient] = {}  # by push, until every server has replayed it
        self._ends: dict[int, tuple[int, FloatArray]] = {}  # updates and weights at the end, by partition
        for push in range(len(pushes)):
            for server, read in zip(servers, pushes.reads(push), strict=True):
                server.expect(read)
        for server in servers:
            server.start()

    def run(self, until: int | None) -> tuple[list[int], FloatArray]:
        """Replay the journals.

        Args:
            until: number of updates at which each server stops. None: replay the whole lineage.

        Returns:
            The number of updates of each partition, and the weights `[num_parameters]`.

        Raises:
            JournalError: a gradient cannot be computed, because records are missing.
            ReplayError: a record comes out differently than in the run.
        """
        while unfinished := self._unfinished(until):
            # A server may need a version that another one reaches after its end, or that can never be reached because
            # the records of an abandoned branch are incomplete.
            if not (self._advance(unfinished) or self._advance(self._servers) or self._abandon_a_branch()):
                raise JournalError(self._explain_deadlock(unfinished))
        weights = np.empty_like(self._job.weights)
        for server in self._servers:
            weights[server.slice] = self._ends[server.number][1]
        return [self._ends[server.number][0] for server in self._servers], weights

    def _unfinished(self, until: int | None) -> list[ReplayServer]:
        """Note the end of each server that has reached it. Return the others."""
        for server in self._servers:
            if server.number in self._ends:
                continue
            if server.on_lineage and until is not None and server.updates >= until:
                self._ends[server.number] = (server.updates, server.weights)
            elif server.end is not None:
                self._ends[server.number] = server.end
        return [server for server in self._servers if server.number not in self._ends]

    def _advance(self, servers: Sequence[ReplayServer]) -> bool:
        """Replay the next record of each server if possible. Return True if any was replayed."""
        replayed = [self._replay_record(server, server.next) for server in servers if server.next is not None]
        return any(replayed)

    def _replay_record(self, server: ReplayServer, record: Record) -> bool:
        """Replay the next record of a server. Return False if its gradient cannot be computed yet."""
        push = self._pushes.push_of(server.number, server.position)
        if push == NO_PUSH:
            server.replay(record, None)
            return True
        if not server.knows_remainder(record):
            return False
        computed = self._computed.get(push) or self._compute(push, record)
        if computed is None:
            return False
        server.replay(record, computed)
        if self._pushes.count_off(push):
            del self._computed[push]
        return True

    def _compute(self, push: int, record: Record) -> ComputedGradient | None:
        """Compute the gradient of a push. Return None if a version that it was computed from is not reached yet."""
        reads = self._pushes.reads(push)
        weights = self._weights_at(reads)
        if weights is None:
            return None
        values = np.empty_like(self._job.weights)
        loss = self._worker.gradient(record.batch, weights, values)
        norm = gradient_norm(values, self._job.layout.num_trainable)
        computed = self._computed[push] = ComputedGradient(values, weights, reads, loss, norm)
        self._release(reads)
        return computed

    def _weights_at(self, reads: Sequence[Version]) -> FloatArray | None:
        """Return the weights at one version of each partition. Return None if one of them is not reached yet."""
        slices = [server.weights_at(read) for server, read in zip(self._servers, reads, strict=True)]
        if len(slices) == 1:
            return slices[0]
        weights = np.empty_like(self._job.weights)
        for server, values in zip(self._servers, slices, strict=True):
            if values is None:
                return None
            weights[server.slice] = values
        return weights

    def _release(self, reads: Sequence[Version]) -> None:
        """Count off a gradient of these versions, by partition."""
        for server, read in zip(self._servers, reads, strict=True):
            server.release(read)

    # Incomplete records

    def _abandon_a_branch(self) -> bool:
        """Let one server skip the rest of an abandoned branch. Return False if no server is on one."""
        for server in self._servers:
            if server.on_abandoned_branch:
                for position in server.leave_branch():
                    self._skip(self._pushes.push_of(server.number, position))
                return True
        return False

    def _skip(self, push: int) -> None:
        """Count off a record that is not replayed."""
        if push != NO_PUSH and self._pushes.count_off(push) and self._computed.pop(push, None) is None:
            self._release(self._pushes.reads(push))

    def _explain_deadlock(self, servers: Sequence[ReplayServer]) -> str:
        """Return a message that explains why no server can proceed: the gradient of its next push is unknown."""
        reasons = [(server, *self._explain_wait(server, server.next)) for server in servers if server.next]
        server, reason, _ = next((reason for reason in reasons if reason[2]), reasons[0])
        reached = min(other.updates for other in self._servers)
        return (
            f"{server.description}; {reason}. The records that a server made after its last checkpoint are lost with "
            f"it. If no server was lost, records are missing or belong to another run. --until {reached} replays the "
            "run up to this point"
        )

    def _explain_wait(self, server: ReplayServer, record: Record) -> tuple[str, bool]:
        """Return the input that the next push of a server lacks, and True if that input can no longer come."""
        if not server.knows_remainder(record):
            return (
                f"it carries on what compression left out of push {record.carries} of its worker's slot {record.slot}, "
                "which no record describes",
                True,
            )
        reads = self._pushes.reads(self._pushes.push_of(server.number, server.position))
        pairs = zip(self._servers, reads, strict=True)
        missing = [(other, read) for other, read in pairs if other.weights_at(read) is None]
        other, read = next((pair for pair in missing if pair[0].has_passed(pair[1])), missing[0])
        return (
            f"it was computed from version {read.updates} of incarnation {read.incarnation} of server {other.number}, "
            "to which no record leads",
            other.has_passed(read),
        )
