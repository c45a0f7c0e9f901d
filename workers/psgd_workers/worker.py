"""The worker: hosts the loop of `psgd_workers.loop` with a model, data and a lane to each server.

The only state that a worker needs to keep between leases is the part of its gradients that compression has not sent
yet.
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
    Compute,
    Computed,
    EndLease,
    LeaseCancelled,
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

# A worker waits two time limits for a receipt. The server may hold the receipt back for the slowest worker, which may
# be silent for one time limit before it is given up.
RECEIPT_FACTOR = 2
MAX_CACHED_VIEWS = 8  # vectors: the weights and gradients of three slots, the local weights, and one to spare
PLAIN = WorkerOptions()
COMPUTED = Computed()
PUSHED = Pushed()


class Route(NamedTuple):
    """A partition's slice of the weights, and the function that connects to its server."""

    part: slice
    connect: Connect


class _GradientMetadata(NamedTuple):
    """Metadata of a gradient. The gradient itself is in its slot."""

    loss: float  # mean over the batch's examples
    norm: float  # `gradient_norm` of the gradient
    compute_s: float  # seconds


class Worker:
    """Computes gradients of batches and pushes them.

    Args:
        name: name of the worker, unique in the run.
        model: model to train.
        layout: layout of the flat weights.
        train: training examples.
        shards: shards, which assign the training examples to batches.
        seed: seed of the job. The random layers of a batch are seeded from it and from the batch's id.
        worker_options: options of the job's workers, such as compression and local steps.
        routes: a route to each partition, in order. Together their slices cover the weights. Without routes, only
            `gradient` and `evaluate` work.
        timeout_s: time limit of a server's answer, in seconds.
        pipeline: number of batches to compute ahead while pushes are under way.
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
        self._local_weights = np.zeros(layout.num_parameters, np.float32) if worker_options.local else None
        self._routes = routes
        self._timeout_s = timeout_s
        parts = [route.part for route in routes]
        self._senders = [
            Sender(name, slot, parts, layout.num_trainable, worker_options) for slot in range(pipeline + 1)
        ]
        self._views: dict[int, tuple[FloatArray, dict[str, FloatArray]]] = {}  # by id() of the vector
        self._loop = WorkerLoop(len(routes), pipeline, worker_options.stop_at)
        self._lanes: list[Lane] = []
        self._memory: Sequence[Slot] = ()  # by slot number
        self._pending: list[Sequence[Pending]] = [() for _ in self._senders]  # by slot number
        self._last_metadata: _GradientMetadata | None = None

    def gradient(self, batch: BatchId, weights: FloatArray, out: FloatArray) -> float:
        """Compute the gradient of a batch's mean loss. Earlier batches do not influence the result.

        With local steps, compute `weights - local` instead, where `local` are the weights after the last local step.

        Args:
            batch: batch to compute.
            weights: `[num_parameters]`, not changed.
            out: `[num_parameters]`, overwritten with the gradient.

        Returns:
            The mean loss over the batch's examples. With local steps, the loss of an example is that of the weights
            before the local step that uses the example.

        Raises:
            WorkerError: the model's own code raised.
        """
        if self._local_weights is None:
            return self._backpropagate(batch, self._shards.rows(batch), weights, out, batch_seed(self._seed, batch))
        assert self._worker_options.local
        local = self._local_weights
        trainable = self._layout.num_trainable
        total = 0.0
        local[:] = weights
        for step, rows in enumerate(self._shards.mini_batches(batch)):
            total += len(rows) * self._backpropagate(batch, rows, local, out, batch_seed(self._seed, batch, step))
            out[:trainable] *= self._worker_options.local.lr
            local -= out
        np.subtract(weights, local, out=out)
        return total / len(self._shards.rows(batch))

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
        """Return the named tensors of a vector as views. They are cached: all batches use the same few vectors."""
        entry = self._views.get(id(flat))
        if entry is None or entry[0] is not flat:
            if len(self._views) == MAX_CACHED_VIEWS:
                self._views.clear()
            entry = self._views[id(flat)] = (flat, self._layout.views(flat))
        return entry[1]

    @property
    def lane_kinds(self) -> tuple[LaneKind, ...]:
        """Return the kind of lane to each partition; empty while the worker is not connected."""
        return tuple(lane.kind for lane in self._lanes)

    def connect(self) -> None:
        """Connect to every server. No-op if the worker is connected.

        Raises:
            LaneError: a server cannot be reached.
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
        """Close every lane. The next lease uses new lanes and new memory.

        The old memory is not used again, because a server may still read a push whose receipt did not arrive.
        """
        for lane in self._lanes:
            lane.close()
        for action in self._loop.handle(LeaseFailed()):
            self._carry_out(action)
        self._lanes = []
        self._memory = ()
        self._views.clear()  # its views keep the old memory mapped

    def hang_up(self, partition: int) -> None:
        """Stop waiting for a server that is gone. Another thread calls this during `work`, whose lease then fails.

        Without this call, the worker would wait until the time limit, because a machine that lost power or its network
        does not close its connections.

        Args:
            partition: partition of the server.
        """
        for lane in self._lanes[partition : partition + 1]:  # no lane while the worker is not connected
            lane.hang_up()

    def work(self, lease: Lease, stopping: Callable[[], bool]) -> LeaseEnd:
        """Compute and push the batches of a lease.

        Args:
            lease: batches to work on.
            stopping: function called before each batch. If it returns True, no more batches of this lease begin.

        Returns:
            The end of the lease, when every push has been answered.

        Raises:
            LaneError: a server cannot be reached or did not answer. Pushes without a receipt are in doubt.
            WorkerError: the model's own code raised.
        """
        self.connect()
        try:
            stopped = self._run_loop(lease, stopping)
        except BaseException:
            self.disconnect()
            raise
        residuals = sum(sender.residual_norm**2 for sender in self._senders)
        return LeaseEnd(lease.id, stopped, residual_norm=sqrt(residuals))

    def _run_loop(self, lease: Lease, stopping: Callable[[], bool]) -> bool:
        """Run the loop until the lease ends. Return True if it was cancelled before its last batch."""
        batches = [self._shards.grid.batch(epoch, position) for epoch, position in lease.positions()]
        event: LoopEvent | None = LeaseGranted(lease.id, batches)
        while True:
            event = event or self._next_receipt()
            if stopping():  # asked after the wait for a receipt, during which the worker may have been told to stop
                self._loop.handle(LeaseCancelled(lease.id))
            actions = self._loop.handle(event)
            event = None
            for action in actions:
                if isinstance(action, EndLease):
                    return action.stopped
                event = self._carry_out(action)

    def _carry_out(self, action: LoopAction) -> LoopEvent | None:
        """Carry out an action. Return the event that completes it, or None if it has none."""
        match action:
            case Settle():
                self._senders[action.slot].settle(action.outcomes)
                self._pending[action.slot] = ()  # lets go of objects that arrived with the receipts
                return None
            case Compute():
                return self._compute(action.slot, action.batch)
            case Push():
                return self._push(action.slot, action.batch, action.wants)
            case Pull():
                return Pulled([lane.pull(action.slot, self._timeout_s) for lane in self._lanes])
            case _:
                raise AssertionError(f"{action} is not an action that a worker carries out")

    def _compute(self, slot: int, batch: BatchId) -> Computed:
        weights, gradient = self._memory[slot]
        began = perf_counter()
        loss = self.gradient(batch, weights, gradient)
        with np.errstate(over="ignore", invalid="ignore"):
            norm = gradient_norm(gradient, self._layout.num_trainable)
        self._last_metadata = _GradientMetadata(loss, norm, perf_counter() - began)
        if self._worker_options.stop_at is None:
            return COMPUTED
        return Computed([lane.version(self._timeout_s) for lane in self._lanes])

    def _push(self, slot: int, batch: BatchId, wants_weights: bool) -> Pushed:
        assert self._last_metadata
        weights, gradient = self._memory[slot]
        loss, norm, compute_s = self._last_metadata
        versions = self._loop.slots[slot].reads
        examples = self._shards.grid.examples(batch)
        messages = self._senders[slot].gradients(batch, examples, versions, gradient, weights, loss, norm, compute_s)
        self._pending[slot] = [
            lane.push(message, slot, wants_weights) for lane, message in zip(self._lanes, messages, strict=True)
        ]
        return PUSHED

    def _next_receipt(self) -> ReceiptArrived:
        """Wait for the next receipt of the oldest unanswered push: that of its first partition without an answer."""
        push = self._loop.oldest_push
        assert push, "the loop has no push under way and returned no action"
        partition = push.outcomes.index(None)
        receipt = self._pending[push.number][partition].receipt(RECEIPT_FACTOR * self._timeout_s)
        if (receipt.worker, receipt.batch) != (self._name, push.batch):
            raise FrameError(
                f"{self._name} pushed {push.batch} but got the receipt of {receipt.worker} for {receipt.batch}"
            )
        return ReceiptArrived(partition, receipt)

    def evaluate(self, weights: FloatArray, validation: Examples) -> Evaluation:
        """Compute the loss and accuracy of weights on the validation examples.

        Args:
            weights: `[num_parameters]`.
            validation: validation examples.

        Raises:
            WorkerError: the model's own code raised.
        """
        try:
            return evaluate(self._model, self._layout.views(weights), validation)
        except Exception as error:
            raise WorkerError(f"the model raised on validation: {type(error).__name__}: {error}") from error


def batch_seed(seed: int, batch: BatchId, *step: int) -> int:
    """Return the seed of a batch's random layers. It depends on the arguments only.

    Args:
        seed: seed of the job.
        batch: batch to seed.
        step: index of the local step, from 0; omitted without local steps.
    """
    # NumPy's SeedSequence would take 20 µs. A digest takes a tenth of that, and is random enough.
    text = ",".join(map(str, (seed, *batch, *step)))
    return int.from_bytes(blake2b(text.encode(), digest_size=4).digest())
