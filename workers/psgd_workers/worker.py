"""The worker: lease → pull → backpropagate → push.

It keeps nothing between batches that matters, but what compression has left out of its pushes so far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from psgd_workers.datasets.examples import Examples
from psgd_workers.errors import LaneError, WorkerError
from psgd_workers.lanes import Lane, Pending
from psgd_workers.layout import Layout
from psgd_workers.messages import (
    BatchId,
    Evaluation,
    FloatArray,
    Lease,
    LeaseEnd,
    Receipt,
    Version,
)
from psgd_workers.models import Model, evaluate
from psgd_workers.sender import Sender, gradient_norm
from psgd_workers.shards import Shards
from psgd_workers.spec import WorkRules

__all__ = ["Route", "Worker", "batch_seed"]

RECEIPT_FACTOR = 2  # a receipt may wait for the slowest worker, who is itself given the limit once
PLAIN = WorkRules()


class Route(NamedTuple):
    """One partition, as a worker sees it: its slice of the weights and the lane to it."""

    part: slice
    lane: Lane


class Worker:
    """Computes gradients of batches and pushes them.

    Args:
        name: unique in the run.
        model: what is trained.
        layout: of the flat weights.
        train: the training examples.
        shards: which of them make which batch.
        seed: of the job; with the batch's name it seeds random layers.
        rules: what the job wants beyond gradients.
        routes: to every partition, together covering the weights; `gradient` needs none.
        timeout_s: seconds a server may take to answer.
    """

    def __init__(
        self,
        name: str,
        model: Model,
        layout: Layout,
        train: Examples,
        shards: Shards,
        seed: int,
        rules: WorkRules = PLAIN,
        routes: Sequence[Route] = (),
        timeout_s: float = 60.0,
    ) -> None:
        self._name = name
        self._model = model
        self._layout = layout
        self._train = train
        self._shards = shards
        self._seed = seed
        self._rules = rules
        self._weights = np.zeros(layout.num_parameters, np.float32)
        self._gradient = np.zeros(layout.num_parameters, np.float32)
        self._local = np.zeros(layout.num_parameters, np.float32) if rules.local else None
        self._routes = routes
        self._sender = Sender(name, [route.part for route in routes], layout.num_trainable, rules)
        self._timeout_s = timeout_s

    def gradient(self, batch: BatchId, weights: FloatArray, out: FloatArray) -> float:
        """What one batch changes: a function of its arguments alone.

        That is the gradient of its mean loss; or, with local steps, the way from where they end back to `weights`.

        Args:
            batch: which examples.
            weights: `[num_parameters]`, read.
            out: `[num_parameters]`, overwritten.

        Returns:
            The mean loss; of local steps, over all of them.

        Raises:
            WorkerError: the model's own code raised.
        """
        if self._local is None:
            return self._backpropagate(batch, self._shards.examples(batch), weights, out, batch_seed(self._seed, batch))
        assert self._rules.local
        local, trainable, total = self._local, self._layout.num_trainable, 0.0
        local[:] = weights
        for step, rows in enumerate(self._shards.mini_batches(batch)):
            total += len(rows) * self._backpropagate(batch, rows, local, out, batch_seed(self._seed, batch, step))
            out[:trainable] *= self._rules.local.lr
            local -= out
        np.subtract(weights, local, out=out)
        return total / len(self._shards.examples(batch))

    def _backpropagate(
        self, batch: BatchId, rows: NDArray[np.int64], weights: FloatArray, out: FloatArray, seed: int
    ) -> float:
        features, labels = self._train.features[rows], self._train.labels[rows]
        named, gradient = self._layout.views(weights), self._layout.views(out)
        try:
            return float(self._model.loss_and_gradient(named, features, labels, gradient, seed))
        except Exception as error:
            raise WorkerError(f"the model raised on {batch}: {type(error).__name__}: {error}") from error

    def work(self, lease: Lease, stopping: Callable[[], bool]) -> LeaseEnd:
        """Work through a lease: the real loop.

        Args:
            lease: the batches.
            stopping: asked before each batch; true ends the lease there.

        Raises:
            LaneError: a server did not answer. Which batches were applied is in doubt.
            WorkerError: the model's own code raised.
        """
        batches = [self._shards.grid.batch(epoch, position) for epoch, position in lease.positions()]
        versions: list[Version] | None = None
        for number, batch in enumerate(batches):
            if stopping():
                return LeaseEnd(lease.id, stopped=True, residual_norm=self._sender.residual_norm)
            if versions is None:
                versions = [route.lane.pull(self._weights[route.part], self._timeout_s) for route in self._routes]
            receipts = self._push(batch, versions, goes_on=number + 1 < len(batches))
            versions = [receipt.version for receipt in receipts] or None
        return LeaseEnd(lease.id, stopped=False, residual_norm=self._sender.residual_norm)

    def _push(self, batch: BatchId, versions: Sequence[Version], goes_on: bool) -> list[Receipt]:
        """The receipts, one for each partition; none if the gradient is too stale to be pushed."""
        began = perf_counter()
        loss = self.gradient(batch, self._weights, self._gradient)
        with np.errstate(over="ignore", invalid="ignore"):
            norm = gradient_norm(self._gradient, self._layout.num_trainable)
        compute_s = perf_counter() - began
        if self._too_stale(versions):
            return []
        examples = len(self._shards.examples(batch))
        gradients = self._sender.gradients(
            batch, examples, versions, self._gradient, self._weights, loss, norm, compute_s
        )
        pending = [
            lane.push(gradient, self._weights[part] if goes_on else None)
            for (part, lane), gradient in zip(self._routes, gradients, strict=True)
        ]
        return self._receipts(batch, pending)

    def _too_stale(self, versions: Sequence[Version]) -> bool:
        limit = self._rules.stop_at
        if limit is None:
            return False
        now = [route.lane.version(self._timeout_s) for route in self._routes]
        return any(new.updates - read.updates >= limit for new, read in zip(now, versions, strict=True))

    def _receipts(self, batch: BatchId, pending: Sequence[Pending]) -> list[Receipt]:
        receipts: list[Receipt] = []
        try:
            for push in pending:
                receipt = push.receipt(RECEIPT_FACTOR * self._timeout_s)
                receipts.append(self._checked(receipt, batch))
        finally:
            self._sender.settle([receipt.outcome for receipt in receipts])
        return receipts

    def _checked(self, receipt: Receipt, batch: BatchId) -> Receipt:
        if (receipt.worker, receipt.batch) != (self._name, batch):
            raise LaneError(f"{self._name} pushed {batch} and got a receipt for {receipt.batch} of {receipt.worker}")
        return receipt

    def evaluate(self, weights: FloatArray, validation: Examples) -> Evaluation:
        """Loss and accuracy of `weights` `[num_parameters]` on the validation examples.

        Raises:
            WorkerError: the model's own code raised.
        """
        try:
            return evaluate(self._model, self._layout.views(weights), validation)
        except Exception as error:
            raise WorkerError(f"the model raised on validation: {type(error).__name__}: {error}") from error


def batch_seed(seed: int, batch: BatchId, *step: int) -> int:
    """What seeds the random layers of a batch, or of one of its local steps: a function of the job's seed and names."""
    return int(np.random.SeedSequence([seed, *batch, *step]).generate_state(1)[0])
