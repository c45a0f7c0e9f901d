"""The worker: lease → pull → backpropagate → push. It keeps nothing between batches that matters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import NamedTuple

import numpy as np

from psgd_workers.datasets.examples import Examples
from psgd_workers.errors import LaneError, WorkerError
from psgd_workers.lanes import Lane, Pending
from psgd_workers.layout import Layout
from psgd_workers.messages import BatchId, Evaluation, FloatArray, Gradient, Lease, LeaseEnd, Receipt, Version
from psgd_workers.models import Model, evaluate
from psgd_workers.shards import Shards

__all__ = ["Route", "Worker"]

RECEIPT_FACTOR = 2  # a receipt may wait for the slowest worker, who is itself given the limit once


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
        routes: Sequence[Route] = (),
        timeout_s: float = 60.0,
    ) -> None:
        self._name = name
        self._model = model
        self._layout = layout
        self._train = train
        self._shards = shards
        self._seed = seed
        self._weights = np.zeros(layout.num_parameters, np.float32)
        self._gradient = np.zeros(layout.num_parameters, np.float32)
        self._routes = routes
        self._timeout_s = timeout_s

    def gradient(self, batch: BatchId, weights: FloatArray, out: FloatArray) -> float:
        """Backpropagate one batch: a function of its arguments alone.

        Args:
            batch: which examples.
            weights: `[num_parameters]`, read.
            out: `[num_parameters]`, overwritten with the gradient of the batch's mean loss.

        Returns:
            The mean loss.

        Raises:
            WorkerError: the model's own code raised.
        """
        rows = self._shards.examples(batch)
        features, labels = self._train.features[rows], self._train.labels[rows]
        named, gradient = self._layout.views(weights), self._layout.views(out)
        seed = _batch_seed(self._seed, batch)
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
                return LeaseEnd(lease.id, stopped=True)
            if versions is None:
                versions = [route.lane.pull(self._weights[route.part], self._timeout_s) for route in self._routes]
            goes_on = number + 1 < len(batches)
            receipts = self._push(batch, versions, goes_on)
            versions = [receipt.version for receipt in receipts]
        return LeaseEnd(lease.id, stopped=False)

    def _push(self, batch: BatchId, versions: Sequence[Version], goes_on: bool) -> list[Receipt]:
        began = perf_counter()
        loss = self.gradient(batch, self._weights, self._gradient)
        trainable = self._gradient[: self._layout.num_trainable]
        with np.errstate(over="ignore"):  # too long for float32 is as good as not finite
            norm = float(np.sqrt(np.dot(trainable, trainable)))
        if not np.isfinite(self._gradient[self._layout.num_trainable :]).all():
            norm = float("nan")  # a buffer that is not finite is refused like a gradient
        compute_s = perf_counter() - began
        examples = len(self._shards.examples(batch))
        pending: list[Pending] = []
        for (part, lane), read in zip(self._routes, versions, strict=True):
            values = self._gradient[part]
            gradient = Gradient(self._name, batch, examples, read, values, loss, norm, compute_s)
            pending.append(lane.push(gradient, self._weights[part] if goes_on else None))
        return [self._checked(push.receipt(RECEIPT_FACTOR * self._timeout_s), batch) for push in pending]

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


def _batch_seed(seed: int, batch: BatchId) -> int:
    return int(np.random.SeedSequence([seed, *batch]).generate_state(1)[0])
