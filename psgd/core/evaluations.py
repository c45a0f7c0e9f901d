"""Evaluations: which weights are to be validated, who is at it, and what came out."""

from __future__ import annotations

from collections import deque

from psgd.core.events import Evaluate
from psgd.core.roster import Roster, WorkerRecord
from psgd_workers.messages import Evaluation

__all__ = ["Evaluations"]


class Evaluations:
    """Weights are named by how many epochs were complete when they were copied; None: the final ones.

    Args:
        roster: who can evaluate.
        enabled: whether there is anything to validate on.
    """

    def __init__(self, roster: Roster, enabled: bool) -> None:
        self._roster = roster
        self._enabled = enabled
        self._wanted: deque[int | None] = deque()
        self.results: dict[int | None, Evaluation] = {}

    @property
    def waiting(self) -> bool:
        """Whether some weights have no worker yet."""
        return bool(self._wanted)

    @property
    def open(self) -> int:
        """How many have no result yet."""
        return len(self._wanted) + sum(len(worker.evaluations) for worker in self._roster)

    def want(self, epochs: int | None) -> None:
        """Ask for an evaluation, unless it was asked for already."""
        under_way = epochs in self._wanted or any(epochs in worker.evaluations for worker in self._roster)
        if self._enabled and not under_way and epochs not in self.results:
            self._wanted.append(epochs)

    def assign(self, now: float) -> list[Evaluate]:
        """Give what waits to the workers with the least to do."""
        actions = []
        while self._wanted and (up := self._roster.up):
            worker = min(up, key=lambda worker: len(worker.leases) + len(worker.evaluations))
            if not worker.busy:
                worker.alive_at = now
            worker.evaluations.append(self._wanted[0])
            actions.append(Evaluate(worker.name, self._wanted.popleft()))
        return actions

    def done(self, worker: WorkerRecord, epochs: int | None, evaluation: Evaluation, now: float) -> None:
        worker.evaluations.remove(epochs)
        worker.alive_at = worker.lease_began = now
        self.results[epochs] = evaluation

    def lost(self, worker: WorkerRecord) -> None:
        """What a worker was at when it died goes first to another."""
        self._wanted.extendleft(reversed(worker.evaluations))
