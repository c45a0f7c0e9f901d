"""The worker: lease → pull → backpropagate → push.

It keeps nothing between batches that matters, but what compression has left out of its pushes so far.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import sqrt
from time import perf_counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from psgd_workers.data.examples import Examples
from psgd_workers.data.shards import Shards
from psgd_workers.errors import FrameError, WorkerError
from psgd_workers.gradients.layout import Layout
from psgd_workers.gradients.sender import Sender, gradient_norm
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
from psgd_workers.spec import WorkerOptions
from psgd_workers.transport.lane import Connect, Lane, LaneKind, Pending
from psgd_workers.transport.memory import Segment, Slot

__all__ = ["Route", "Worker", "batch_seed"]

RECEIPT_FACTOR = 2  # a receipt may wait for the slowest worker, who is itself given the limit once
KNOWN_VECTORS = 8  # weights and gradient of each batch in hand, of which there are at most three, and some to spare
PLAIN = WorkerOptions()


class Route(NamedTuple):
    """One partition, as a worker sees it: its slice of the weights and how to reach its server."""

    part: slice
    connect: Connect


@dataclass(slots=True)
class _Desk:
    """One batch in hand. Its push is answered with the weights for the next batch at the same desk."""

    number: int
    slot: Slot
    sender: Sender
    versions: Sequence[Version] | None = None  # of the weights in the slot, by partition; None: there are none
    batch: BatchId | None = None  # whose push is under way
    pending: Sequence[Pending] = ()
    wants: bool = False  # whether that push brings weights back


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
        pipeline: batches to compute ahead while pushes are under way.
    """

    def __init__(
        self,
        name: str,
        model: Model,
        layout: Layout,
        train: Examples,
        shards: Shards,
        seed: int,
        worker_options: WorkerOptions = PLAIN,
        routes: Sequence[Route] = (),
        timeout_s: float = 60.0,
        pipeline: int = 0,
    ) -> None:
        self._name = name
        self._model = model
        self._layout = layout
        self._train = train
        self._shards = shards
        self._seed = seed
        self._worker_options = worker_options
        self._local = np.zeros(layout.num_parameters, np.float32) if worker_options.local else None
        self._routes = routes
        self._timeout_s = timeout_s
        parts = [route.part for route in routes]
        self._senders = [
            Sender(name, slot, parts, layout.num_trainable, worker_options) for slot in range(pipeline + 1)
        ]
        self._known: dict[int, tuple[FloatArray, dict[str, FloatArray]]] = {}  # by identity
        self._lanes: list[Lane] = []
        self._desks: list[_Desk] = []

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
        assert self._worker_options.local
        local = self._local
        trainable = self._layout.num_trainable
        total = 0.0
        local[:] = weights
        for step, rows in enumerate(self._shards.mini_batches(batch)):
            total += len(rows) * self._backpropagate(batch, rows, local, out, batch_seed(self._seed, batch, step))
            out[:trainable] *= self._worker_options.local.lr
            local -= out
        np.subtract(weights, local, out=out)
        return total / len(self._shards.examples(batch))

    def _backpropagate(
        self, batch: BatchId, rows: NDArray[np.int64], weights: FloatArray, out: FloatArray, seed: int
    ) -> float:
        features = self._train.inputs(rows)
        labels = self._train.labels[rows]
        named = self._tensors(weights)
        gradient = self._tensors(out)
        try:
            return float(self._model.loss_and_gradient(named, features, labels, gradient, seed))
        except Exception as error:
            raise WorkerError(f"the model raised on {batch}: {type(error).__name__}: {error}") from error

    def _tensors(self, flat: FloatArray) -> dict[str, FloatArray]:
        """The named tensors of a vector, made once: batch after batch comes with the same few vectors."""
        known = self._known.get(id(flat))
        if known is None or known[0] is not flat:
            if len(self._known) == KNOWN_VECTORS:
                self._known.clear()
            known = self._known[id(flat)] = flat, self._layout.views(flat)
        return known[1]

    @property
    def lanes(self) -> tuple[LaneKind, ...]:
        """How each partition is reached, once connected."""
        return tuple(lane.kind for lane in self._lanes)

    def connect(self) -> None:
        """Reach every server, if that is not done.

        Raises:
            LaneError: one cannot be reached.
        """
        if self._lanes:
            return
        segment = Segment(self._layout.num_parameters, len(self._senders))
        try:
            for route in self._routes:
                self._lanes.append(route.connect(segment))
        except BaseException:
            self.disconnect()
            raise
        finally:
            segment.close()
        desks = zip(segment.slots, self._senders, strict=True)
        self._desks = [_Desk(number, slot, sender) for number, (slot, sender) in enumerate(desks)]

    def disconnect(self) -> None:
        """Let go of every server; the next lease begins with other lanes and other memory.

        A server may still read the memory of a push whose receipt did not come.
        """
        for lane in self._lanes:
            lane.close()
        for desk in self._desks:
            if desk.batch is not None:
                desk.sender.settle([])
        self._lanes = []
        self._desks = []
        self._known.clear()  # it keeps memory mapped

    def hang_up(self, partition: int) -> None:
        """Wait no more for a server that is gone; to be called beside `work`, whose lease then fails.

        A machine that lost its power, or its cable, closes no connection.
        """
        for lane in self._lanes[partition : partition + 1]:  # none while there is no connection
            lane.hang_up()

    def work(self, lease: Lease, stopping: Callable[[], bool]) -> LeaseEnd:
        """Work through a lease: the real loop.

        Args:
            lease: the batches.
            stopping: asked before each batch; true ends the lease there.

        Raises:
            LaneError: a server did not answer. Which batches were applied is in doubt.
            WorkerError: the model's own code raised.
        """
        self.connect()
        try:
            stopped = self._work(lease, stopping)
        except BaseException:
            self.disconnect()
            raise
        residuals = sum(sender.residual_norm**2 for sender in self._senders)
        return LeaseEnd(lease.id, stopped, residual_norm=sqrt(residuals))

    def _work(self, lease: Lease, stopping: Callable[[], bool]) -> bool:
        """Whether it was stopped; no push is under way after it."""
        batches = [self._shards.grid.batch(epoch, position) for epoch, position in lease.positions()]
        desks = deque(self._desks)
        stopped = False
        for number, batch in enumerate(batches):
            desk = desks[0]
            self._settle(desk)
            if stopping():  # perhaps it was asked to while it waited
                stopped = True
                break
            if desk.versions is None:
                desk.versions = [lane.pull(desk.number, self._timeout_s) for lane in self._lanes]
            self._push(desk, batch, wants=number + len(desks) < len(batches))
            desks.rotate(-1)
        for desk in desks:  # the oldest push first
            self._settle(desk)
            desk.versions = None
        return stopped

    def _push(self, desk: _Desk, batch: BatchId, wants: bool) -> None:
        """Compute a gradient and send it, unless it is too stale to be pushed."""
        assert desk.versions is not None
        (weights, values) = desk.slot
        versions = desk.versions
        began = perf_counter()
        loss = self.gradient(batch, weights, values)
        with np.errstate(over="ignore", invalid="ignore"):
            norm = gradient_norm(values, self._layout.num_trainable)
        compute_s = perf_counter() - began
        desk.versions = None
        if self._too_stale(versions):
            return
        examples = len(self._shards.examples(batch))
        gradients = desk.sender.gradients(batch, examples, versions, values, weights, loss, norm, compute_s)
        desk.batch = batch
        desk.wants = wants
        desk.pending = [
            lane.push(gradient, desk.number, wants) for lane, gradient in zip(self._lanes, gradients, strict=True)
        ]

    def _too_stale(self, versions: Sequence[Version]) -> bool:
        limit = self._worker_options.stop_at
        if limit is None:
            return False
        now = [lane.version(self._timeout_s) for lane in self._lanes]
        return any(new.updates - read.updates >= limit for new, read in zip(now, versions, strict=True))

    def _settle(self, desk: _Desk) -> None:
        """Wait for the receipts of the desk's push, if one is under way."""
        if desk.batch is None:
            return
        receipts: list[Receipt] = []
        try:
            for push in desk.pending:
                receipt = push.receipt(RECEIPT_FACTOR * self._timeout_s)
                receipts.append(self._checked(receipt, desk.batch))
        finally:
            desk.sender.settle([receipt.outcome for receipt in receipts])
            desk.batch = None
            desk.pending = ()
        if desk.wants:
            desk.versions = [receipt.version for receipt in receipts]

    def _checked(self, receipt: Receipt, batch: BatchId) -> Receipt:
        if (receipt.worker, receipt.batch) != (self._name, batch):
            raise FrameError(f"{self._name} pushed {batch} and got a receipt for {receipt.batch} of {receipt.worker}")
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
    # A digest is as good as NumPy's SeedSequence here, and takes a tenth of its 20 µs.
    names = ",".join(map(str, (seed, *batch, *step)))
    return int.from_bytes(blake2b(names.encode(), digest_size=4).digest())
