"""The worker: hosts the loop of `psgd_workers.loop` with a model, data and a lane to each server.

It keeps nothing between leases that matters, but what compression has left out of its pushes so far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from psgd_workers.loop import (
    Cancelled,
    Compute,
    Computed,
    EndLease,
    LeaseFailed,
    LeaseGranted,
    LoopAction,
    LoopEvent,
    Pull,
    Pulled,
    Push,
    Pushed,
    ReceiptArrived,
    Settle,
    WorkerLoop,
)
from psgd_workers.messages import BatchId, Evaluation, FloatArray, Lease, LeaseEnd
from psgd_workers.models import Model, evaluate
from psgd_workers.spec import WorkerOptions
from psgd_workers.transport.lane import Connect, Lane, LaneKind, Pending
from psgd_workers.transport.memory import Segment, Slot

__all__ = ["Route", "Worker", "batch_seed"]

RECEIPT_FACTOR = 2  # a receipt may wait for the slowest worker, who is itself given the limit once
KNOWN_VECTORS = 8  # weights and gradient of each batch in hand, of which there are at most three, and some to spare
PLAIN = WorkerOptions()
COMPUTED = Computed()
PUSHED = Pushed()


class Route(NamedTuple):
    """One partition, as a worker sees it: its slice of the weights and how to reach its server."""

    part: slice
    connect: Connect


class _Backpropagated(NamedTuple):
    """Result of a computation, besides the gradient in its slot."""

    loss: float  # mean over the batch's examples
    norm: float  # `gradient_norm` of the gradient
    compute_s: float


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
        self._loop = WorkerLoop(len(routes), pipeline, worker_options.stop_at)
        self._lanes: list[Lane] = []
        self._memory: Sequence[Slot] = ()  # by slot of the loop
        self._pending: list[Sequence[Pending]] = [() for _ in self._senders]  # by slot, of the push under way
        self._computed: _Backpropagated | None = None  # the last computation's

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
        self._memory = segment.slots

    def disconnect(self) -> None:
        """Let go of every server; the next lease begins with other lanes and other memory.

        A server may still read the memory of a push whose receipt did not come.
        """
        for lane in self._lanes:
            lane.close()
        for action in self._loop.handle(LeaseFailed()):
            self._carry_out(action)
        self._lanes = []
        self._memory = ()
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
        """Host the loop until the lease ends; no push is under way then. Return True if it was stopped."""
        batches = [self._shards.grid.batch(epoch, position) for epoch, position in lease.positions()]
        event: LoopEvent | None = LeaseGranted(lease.id, batches)
        while True:
            if stopping():
                self._loop.handle(Cancelled(lease.id))
            actions = self._loop.handle(event or self._next_receipt())
            event = None
            for action in actions:
                if isinstance(action, EndLease):
                    return action.stopped
                event = self._carry_out(action)

    def _carry_out(self, action: LoopAction) -> LoopEvent | None:
        """Do what the loop wants. Return what came of it, if the loop waits for that."""
        match action:
            case Settle():
                self._senders[action.slot].settle(action.outcomes)
                self._pending[action.slot] = ()  # it may keep alive what came with the receipts
                return None
            case Compute():
                return self._compute(action.slot, action.batch)
            case Push():
                return self._push(action.slot, action.batch, action.wants)
            case Pull():
                return Pulled([lane.pull(action.slot, self._timeout_s) for lane in self._lanes])
            case _:
                raise AssertionError(f"{action} is not for a worker to carry out")

    def _compute(self, slot: int, batch: BatchId) -> Computed:
        weights, values = self._memory[slot]
        began = perf_counter()
        loss = self.gradient(batch, weights, values)
        with np.errstate(over="ignore", invalid="ignore"):
            norm = gradient_norm(values, self._layout.num_trainable)
        self._computed = _Backpropagated(loss, norm, perf_counter() - began)
        if self._worker_options.stop_at is None:
            return COMPUTED
        return Computed([lane.version(self._timeout_s) for lane in self._lanes])

    def _push(self, slot: int, batch: BatchId, wants: bool) -> Pushed:
        assert self._computed
        weights, values = self._memory[slot]
        loss, norm, compute_s = self._computed
        versions = self._loop.slots[slot].reads
        examples = len(self._shards.examples(batch))
        gradients = self._senders[slot].gradients(batch, examples, versions, values, weights, loss, norm, compute_s)
        self._pending[slot] = [
            lane.push(gradient, slot, wants) for lane, gradient in zip(self._lanes, gradients, strict=True)
        ]
        return PUSHED

    def _next_receipt(self) -> ReceiptArrived:
        """Wait for the oldest push under way: for its first partition that has not answered."""
        slot = self._loop.oldest_push
        assert slot, "the loop waits for nothing"
        partition = slot.outcomes.index(None)
        receipt = self._pending[slot.number][partition].receipt(RECEIPT_FACTOR * self._timeout_s)
        if (receipt.worker, receipt.batch) != (self._name, slot.batch):
            raise FrameError(
                f"{self._name} pushed {slot.batch} and got a receipt for {receipt.batch} of {receipt.worker}"
            )
        return ReceiptArrived(partition, receipt)

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
