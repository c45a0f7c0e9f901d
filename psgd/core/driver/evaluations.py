"""Evaluations: which weights are to be validated, who is at it, and what came out."""

from __future__ import annotations

from collections import deque

from psgd.core.driver.events import Evaluate
from psgd.core.driver.workers import WorkerRecord, WorkerTable
from psgd_workers.messages import Evaluation

__all__ = ["Evaluations"]


class Evaluations:
    """Weights are named by how many epochs were complete when they were copied; None: the final ones.

    Args:
        roster: who can evaluate.
        enabled: whether there is anything to validate on.
    """

    def __init__(self, worker_table: WorkerTable, enabled: bool) -> None:
        self._worker_table = worker_table
        self._enabled = enabled
        self._wanted: deque[int | None] = deque()
        self._void: list[tuple[str, int | None]] = []  # under way, of weights that are no longer
        self.results: dict[int | None, Evaluation] = {}

    @property
    def waiting(self) -> bool:
        """Whether some weights have no worker yet."""
        return bool(self._wanted)

    @property
    def enabled(self) -> bool:
        """True if there is anything to validate on."""
        return self._enabled

    @property
    def awaited(self) -> list[int | None]:
        """Names of the weights that were asked for and have no result yet, those under way first."""
        under_way = [
            epochs
            for worker in self._worker_table
            for epochs in worker.evaluations
            if (worker.name, epochs) not in self._void
        ]
        return [*under_way, *self._wanted]

    @property
    def open(self) -> int:
        """How many have no result yet."""
        return len(self._wanted) + sum(len(worker.evaluations) for worker in self._worker_table)

    def want(self, epochs: int | None) -> None:
        """Ask for an evaluation, unless it was asked for already."""
        if self._enabled and epochs not in self.awaited and epochs not in self.results:
            self._wanted.append(epochs)

    def assign(self, now: float) -> list[Evaluate]:
        """Give what waits to the workers with the least to do."""
        actions = []
        while self._wanted and (up := self._worker_table.up):
            worker = min(up, key=lambda worker: len(worker.leases) + len(worker.evaluations))
            if not worker.busy:
                worker.alive_at = now
            worker.evaluations.append(self._wanted[0])
            actions.append(Evaluate(worker.name, self._wanted.popleft()))
        return actions

    def done(self, worker: WorkerRecord, epochs: int | None, evaluation: Evaluation, now: float) -> None:
        if not self._close(worker, epochs, now):
            self.results[epochs] = evaluation

    def cancelled(self, worker: WorkerRecord, epochs: int | None, now: float) -> None:
        """The weights were lost with their server: they are asked for again when the epoch is complete again."""
        self._close(worker, epochs, now)

    def _close(self, worker: WorkerRecord, epochs: int | None, now: float) -> bool:
        """Whether it was of weights that are no longer."""
        worker.evaluations.remove(epochs)
        worker.alive_at = worker.lease_began = now
        void = (worker.name, epochs) in self._void
        if void:
            self._void.remove((worker.name, epochs))
        return void

    def lost(self, worker: WorkerRecord) -> None:
        """What a worker was at when it died goes first to another."""
        void = [epochs for name, epochs in self._void if name == worker.name]
        self._void = [one for one in self._void if one[0] != worker.name]
        for epochs in void:
            worker.evaluations.remove(epochs)
        self._wanted.extendleft(reversed(worker.evaluations))

    def forget(self, epochs: int) -> None:
        """A partition was restored to fewer epochs: what was found of the weights after them is of another past."""
        self.results = {ends: result for ends, result in self.results.items() if ends is not None and ends <= epochs}
        self._wanted = deque(ends for ends in self._wanted if ends is not None and ends <= epochs)
        older = [(name, ends) for name, ends in self._void if ends is not None and ends <= epochs]
        self._void = older + [
            (worker.name, ends)
            for worker in self._worker_table
            for ends in worker.evaluations
            if ends is None or ends > epochs
        ]
