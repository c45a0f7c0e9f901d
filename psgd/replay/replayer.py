"""The player: a run's servers once more, and what its workers sent them.

Every server goes through its own journal. A gradient is computed once, from the versions of every partition that the
journals say it was read from, and each server steps on its slice of it in its own order. So a server may have to wait
for another to come to a version; as each waited for nothing but its past in the run, one of them can always go on.

A push that some servers took and that is in no journal of the others, since its worker died on the way or the
checkpoint was cut there, read a version of theirs that nobody wrote down: it is found by the loss it gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np

from psgd.core.server.journal import RecordKind
from psgd.errors import ReplayError
from psgd.job import OpenJob
from psgd.replay.lineage import Record
from psgd.replay.pushes import Pushes
from psgd.replay.server import ReplayServer
from psgd_workers.gradients.sender import TAKEN, Sender, gradient_norm
from psgd_workers.messages import FloatArray, Gradient, Outcome, Version
from psgd_workers.spec import NoCompression

__all__ = ["Replayer"]

Reads = tuple[Version, ...]  # by partition


class Replayer:
    """All servers, and what workers sent them.

    Args:
        job: of the run.
        servers: by partition.
        pushes: of their journals.
        pipeline: the most batches that any of its workers computed ahead.
    """

    def __init__(self, job: OpenJob, servers: Sequence[ReplayServer], pushes: Pushes, pipeline: int) -> None:
        self._job = job
        self._servers = servers
        self._pushes = pushes
        self._worker = job.worker("replay")  # computes for all of them: a gradient is a function of batch and weights
        self._senders: dict[tuple[int, str], Sender] = {}  # by incarnation and worker
        self._compresses = not isinstance(job.spec.compression, NoCompression)
        self._made: dict[int, dict[int, Gradient]] = {}  # push -> what is still to be taken, by partition
        self._tried: dict[int, set[Reads]] = {}  # push -> what it was not read from
        self._ends: dict[int, tuple[int, FloatArray]] = {}  # partition -> its updates and weights where it stopped
        self._look_ahead(pipeline)

    def _look_ahead(self, pipeline: int) -> None:
        """Tell every server which of its versions will be read."""
        pushes = self._pushes
        for push in range(len(pushes)):
            takers = [server.number for server in self._servers if pushes.outcome(server.number, push) in TAKEN]
            if not takers:
                continue
            for server, read in zip(self._servers, pushes.reads(push), strict=True):
                if read is None:
                    server.search(push, pushes.oldest_read(server.number, push, takers[0], pipeline))
                else:
                    server.expect(read)

    def play(self, until: int | None) -> tuple[list[int], FloatArray]:
        """Go through the journals, to their end or until every server made so many updates.

        Returns:
            The updates of each partition there, and the weights.

        Raises:
            ReplayError: at the first record that comes out otherwise.
        """
        for server in self._servers:
            server.keep()
        while going := self._going(until):
            if not self._step(going) and not self._step(self._servers):  # one may need what another does after its end
                raise ReplayError(self._stuck(going))
        weights = np.empty_like(self._job.weights)
        for server in self._servers:
            weights[server.slice] = self._ends[server.number][1]
        return [self._ends[server.number][0] for server in self._servers], weights

    def _going(self, until: int | None) -> list[ReplayServer]:
        """The servers that are not at their end yet."""
        going = [server for server in self._servers if server.number not in self._ends]
        for server in going:
            if server.next is None or (until is not None and server.version.updates >= until):
                self._ends[server.number] = server.version.updates, server.weights
        return [server for server in going if server.number not in self._ends]

    def _step(self, servers: Sequence[ReplayServer]) -> bool:
        """Let one record happen on each of them; whether any could."""
        moved = [self._again(server, server.next) for server in servers if server.next is not None]
        return any(moved)

    def _again(self, server: ReplayServer, record: Record) -> bool:
        gradient = None
        if record.kind == RecordKind.PUSH:
            gradient = self._gradient(server, record)
            if gradient is None:
                return False
        server.again(record, gradient)
        return True

    def _stuck(self, servers: Sequence[ReplayServer]) -> str:
        """Why none of them can go on: each has a push before it whose gradient cannot be computed."""
        for server in servers:
            if None in self._pushes.reads(self._pushes.number(server.number, server.place)):
                return (
                    f"{server.told}; the push is not in every server's journal, and no version of the others gives its "
                    "loss. Records are missing or another run's, or psgd or its libraries are not those of env.json"
                )
        return (
            f"{servers[0].told}; the replay never came to the version it read. Records before it are missing or "
            "another run's"
        )

    # Gradients

    def _gradient(self, server: ReplayServer, record: Record) -> Gradient | None:
        """What the worker pushed; None: that cannot be known yet."""
        if record.outcome not in TAKEN:
            return server.refused(record)
        push = self._pushes.number(server.number, server.place)
        if push not in self._made and not (self._in_turn(push, record) and self._make(push, record)):
            return None
        made = self._made[push]
        gradient = made.pop(server.number)
        if not made:
            del self._made[push]
        return gradient

    def _in_turn(self, push: int, record: Record) -> bool:
        """Whether all that the worker pushed before was made: what is left out of one push goes into the next."""
        if not self._compresses:
            return True
        earlier = (
            (server.number, number)
            for server in self._servers
            for number in self._pushes.earlier(server.number, push, record.name, server.place)
        )
        return all(
            number in self._made or self._pushes.outcome(partition, number) not in TAKEN
            for partition, number in earlier
        )

    def _make(self, push: int, record: Record) -> bool:
        """Compute a gradient, if what it was computed from is known."""
        values = np.empty_like(self._job.weights)
        searched = None in self._pushes.reads(push)
        for reads in self._reads(push):
            weights = self._shown(reads)
            if weights is None:
                return False
            loss = self._worker.gradient(record.batch, weights, values)
            if not searched or np.float32(loss) == record.loss:
                self._send(push, record, reads, values, weights, loss)
                return True
            self._tried.setdefault(push, set()).add(reads)
        return False

    def _reads(self, push: int) -> Iterator[Reads]:
        """The versions of every partition that it was computed from; or, one by one, those it may have been."""
        choices = [
            server.candidates(push) if read is None else [read]
            for server, read in zip(self._servers, self._pushes.reads(push), strict=True)
        ]
        return (reads for reads in product(*choices) if reads not in self._tried.get(push, ()))

    def _shown(self, reads: Reads) -> FloatArray | None:
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

    def _send(
        self, push: int, record: Record, reads: Reads, values: FloatArray, weights: FloatArray, loss: float
    ) -> None:
        """Cut it for every server, as the worker did; those that took it will take it again."""
        sender = self._sender(record)
        norm = gradient_norm(values, self._job.layout.num_trainable)
        sent = sender.gradients(record.batch, record.examples, reads, values, weights, loss, norm, record.compute_s)
        outcomes = [self._pushes.outcome(partition, push) for partition in range(len(sent))]
        sender.settle([outcome or Outcome.REQUEUED for outcome in outcomes])
        self._made[push] = {number: sent[number] for number, outcome in enumerate(outcomes) if outcome in TAKEN}
        self._tried.pop(push, None)
        for server, read in zip(self._servers, reads, strict=True):
            server.forget(push, read)

    def _sender(self, record: Record) -> Sender:
        """The worker's; after a fork those that compress are new, even if they bear old names."""
        key = record.incarnation, record.worker
        if key not in self._senders:
            oldest = min(server.version.incarnation for server in self._servers)
            self._senders = {known: sender for known, sender in self._senders.items() if known[0] >= oldest}
            layout = self._job.layout
            worker_options = self._job.spec.worker_options
            parts = [server.slice for server in self._servers]
            self._senders[key] = Sender(record.worker, parts, layout.num_trainable, worker_options)
        return self._senders[key]
