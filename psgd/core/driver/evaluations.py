"""Evaluations: the weights to validate, the workers that validate them, and the results."""

from __future__ import annotations

from collections import Counter, deque

from psgd.core.driver.events import Evaluate
from psgd.core.driver.workers import WorkerRecord, WorkerTable
from psgd_workers.messages import Evaluation

__all__ = ["Evaluations"]


class Evaluations:
    """All evaluations of a run.

    Weights are named by the number of epochs that were complete when they were copied; None names the final weights.

    Args:
        worker_table: the workers, which compute the evaluations.
        enabled: True if the data has a validation part.

    Attributes:
        enabled: True if the data has a validation part.
        results: name of the weights -> their evaluation.
    """

    def __init__(self, worker_table: WorkerTable, enabled: bool) -> None:
        self._worker_table = worker_table
        self.enabled = enabled
        self._wanted: deque[int | None] = deque()
        self._void: list[tuple[str, int | None]] = []  # (worker, weights) in progress; these weights were rolled back
        self.results: dict[int | None, Evaluation] = {}

    @property
    def waiting(self) -> bool:
        """Return True if some weights have no worker yet."""
        return bool(self._wanted)

    @property
    def awaited(self) -> list[int | None]:
        """Return the names of the weights without a result, beginning with those that a worker evaluates."""
        void = Counter(self._void)
        in_progress: list[int | None] = []
        for worker in self._worker_table:
            for epochs in worker.evaluations:  # of several with one name, the rolled back ones come first
                if void[worker.name, epochs]:
                    void[worker.name, epochs] -= 1
                else:
                    in_progress.append(epochs)
        return [*in_progress, *self._wanted]

    @property
    def open(self) -> int:
        """Return the number of evaluations without a result, including those of rolled back weights."""
        return len(self._wanted) + sum(len(worker.evaluations) for worker in self._worker_table)

    def want(self, epochs: int | None) -> None:
        """Request an evaluation of some weights, unless it was requested before."""
        if self.enabled and epochs not in self.awaited and epochs not in self.results:
            self._wanted.append(epochs)

    def assign(self, now: float) -> list[Evaluate]:
        """Assign each requested evaluation to the worker with the fewest leases and evaluations."""
        actions = []
        while self._wanted and (up := self._worker_table.up):
            worker = min(up, key=lambda worker: len(worker.leases) + len(worker.evaluations))
            if not worker.busy:
                worker.alive_at = now
            worker.evaluations.append(self._wanted[0])
            actions.append(Evaluate(worker.name, self._wanted.popleft()))
        return actions

    def done(self, worker: WorkerRecord, epochs: int | None, evaluation: Evaluation, now: float) -> None:
        """Note a worker's result, unless its weights were rolled back."""
        if not self._close(worker, epochs, now):
            self.results[epochs] = evaluation

    def evaluation_lost(self, worker: WorkerRecord, epochs: int | None, now: float) -> None:
        """Close an evaluation without a result: a server does not have the weights any more.

        If the epoch has to be trained again, its evaluation is requested again at its end.
        """
        self._close(worker, epochs, now)

    def _close(self, worker: WorkerRecord, epochs: int | None, now: float) -> bool:
        """Close an evaluation. Return True if its weights were rolled back."""
        worker.evaluations.remove(epochs)
        self._worker_table.turn_to_lease(worker, now)
        void = (worker.name, epochs) in self._void
        if void:
            self._void.remove((worker.name, epochs))
        return void

    def worker_lost(self, worker: WorkerRecord) -> None:
        """Request a lost worker's evaluations again, before all others. Drop evaluations of rolled back weights."""
        void = [epochs for name, epochs in self._void if name == worker.name]
        self._void = [(name, epochs) for name, epochs in self._void if name != worker.name]
        for epochs in void:
            worker.evaluations.remove(epochs)
        self._wanted.extendleft(reversed(worker.evaluations))

    def forget(self, epochs: int) -> None:
        """Drop the results and requests of weights that were rolled back.

        Args:
            epochs: number of epochs that every partition still contains.
        """
        self.results = {
            weights: result for weights, result in self.results.items() if weights is not None and weights <= epochs
        }
        self._wanted = deque(weights for weights in self._wanted if weights is not None and weights <= epochs)
        older = [(name, weights) for name, weights in self._void if weights is not None and weights <= epochs]
        self._void = older + [
            (worker.name, weights)
            for worker in self._worker_table
            for weights in worker.evaluations
            if weights is None or weights > epochs
        ]
