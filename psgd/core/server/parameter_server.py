"""ParameterServer: one partition of the weights, and the way of every push into it.

A push goes through six hooks:

    ADMIT      refuse a duplicate, a gradient that is not finite, one computed from weights that were rolled back, and
               one that the consistency mode does not admit
    DECODE     turn the values as they were sent into float32
    CORRECT    clip, and apply the correction for staleness
    AGGREGATE  add the gradient to the open round; once the round closes, compute its mean
    STEP       let the optimizer update the weights in place
    REPLY      publish the weights that workers pull, and return the receipts that are due

The host calls one method at a time and delivers the receipts that each call returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from psgd.core.server.aggregators import Contribution, Step, StepMember
from psgd.core.server.applied import AppliedSet
from psgd.core.server.average import Average
from psgd.core.server.consistency import Round, build_consistency
from psgd.core.server.corrections import Rescaled, build_correction
from psgd.core.server.epoch_weights import EpochWeights
from psgd.core.server.journal import Journal, RecordKind
from psgd.core.server.live_worker import LiveWorker
from psgd.core.server.observer import ServerObserver
from psgd.core.server.optimizers import build_optimizer
from psgd.core.server.partitions import Partition
from psgd.core.server.published import PrivateVector, Published
from psgd.core.server.push_arrays import INCARNATION, UPDATES, PushArrays
from psgd.core.server.push_check import PushCheck
from psgd.core.server.report import Report
from psgd.core.server.schedules import build_schedule
from psgd.core.server.state import ServerState
from psgd.core.server.tally import Tally
from psgd.spec import JobSpec, Settings
from psgd_workers.gradients.compression import decode
from psgd_workers.messages import BatchId, Encoded, EpochGrid, FloatArray, Gradient, Outcome, Receipt, Version

__all__ = ["ParameterServer"]

# Bound once: in Python 3.11, access through the enum takes 80 ns.
APPLIED = Outcome.APPLIED
BUFFERED = Outcome.BUFFERED


class _Parked(NamedTuple):
    """A push whose receipt is held back."""

    worker: str
    batch: BatchId
    outcome: Outcome  # when the push arrived, before any step
    updates: int  # number of updates when the push arrived; once there are more, a buffered gradient is applied


class ParameterServer:
    """One partition of the weights, with the optimizer, the applied set and the journal that belong to it.

    Args:
        spec: the job to train.
        partition: slice of the weights that this server holds.
        weights: `[partition size]` float32, initial values; copied.
        grid: batches by shard, and number of examples in an epoch.
        version: version of the initial weights.
        published: vector from which workers pull; None: private memory of this server.
        observer: object that is notified of every change of the state; None: no notifications.

    Attributes:
        spec: the job.
        partition: slice of the weights that this server holds.
        grid: batches by shard, and number of examples in an epoch.
        settings: the settings in force; `change` replaces them.
        journal: records of what happened since they were last taken.
    """

    def __init__(
        self,
        spec: JobSpec,
        partition: Partition,
        weights: FloatArray,
        grid: EpochGrid,
        version: Version,
        published: Published | None = None,
        observer: ServerObserver | None = None,
    ) -> None:
        size = partition.stop - partition.start
        trainable = partition.num_trainable
        assert weights.shape == (size,), (weights.shape, partition)
        self.spec = spec
        self.partition = partition
        # Incarnation, updates, and number of updates at which the incarnation began.
        self._version: NDArray[np.int64] = np.array([version.incarnation, version.updates, version.updates])
        self._numbers = self._version.data  # Python reads and writes it in a third of the time
        self._is_observed = observer is not None
        self._observer = observer or ServerObserver()
        self._size = size
        self._correction = build_correction(spec, trainable)
        self._published = published or PrivateVector(size)
        self._published.begin()
        np.copyto(self._published.values, weights)
        self._published.end(version)
        # Workers pull the weights themselves, in the same memory, unless the correction publishes shifted ones.
        self._weights = self._published.values.copy() if self._correction.shifts else self._published.values
        self._trained = self._weights[:trainable]
        self._has_buffers = trainable < size
        self._clipped = np.empty(size, np.float32)
        self._decoded = np.empty(size, np.float32)
        self._push_check = PushCheck(spec, partition, grid)
        self._optimizer = build_optimizer(spec.optimizer, trainable)
        decay = spec.optimizer.ema
        self._average = None if decay is None else Average(decay, self._trained)
        self.grid = grid
        self._settled = AppliedSet(grid)
        # (incarnation, number of updates at which it began), oldest first
        self._history = [(version.incarnation, version.updates)]
        self._round = Round()
        self._refused_epoch = -1  # newest epoch with a refused batch: that epoch has begun, even if nothing was applied
        self._parked: list[_Parked] = []
        self._tally = Tally()
        self._epoch_weights = EpochWeights()
        self.journal = Journal(spec.scaling.servers)
        self._use_settings(spec.settings)
        self._observer.started(self)

    def _use_settings(self, settings: Settings) -> None:
        self.settings = settings
        self._mode = build_consistency(settings.consistency)
        self._late_outcome = Outcome.DISCARDED if settings.consistency.discards_late else Outcome.REQUEUED
        self._aggregator = self._mode.aggregator(self._size, self.partition.num_trainable)
        optimizer = settings.optimizer
        self._max_norm = optimizer.max_grad_norm
        self._clip_value = optimizer.clip_value
        self._correction.rate = optimizer.lr
        self._corrects = self._max_norm is not None or self._clip_value is not None or self._correction.elementwise
        self._schedule = build_schedule(optimizer.schedule, optimizer.lr, self.grid.num_examples)

    @property
    def version(self) -> Version:
        """Version of the weights now."""
        return Version(self._numbers[INCARNATION], self._numbers[UPDATES])

    @property
    def updates(self) -> int:
        """Number of updates in the weights now."""
        return self._numbers[UPDATES]

    @property
    def published(self) -> FloatArray:
        """The weights that workers pull, `[partition size]`; the next step changes them in place."""
        return self._published.values

    @property
    def epochs(self) -> int:
        """Number of complete epochs: every batch of epochs 0 to `epochs` - 1 is contained or skipped."""
        return self._settled.epochs

    @property
    def samples(self) -> int:
        """Number of examples applied."""
        return self._tally.samples

    @property
    def steps_alone(self) -> bool:
        """Return True if, under the present settings, a push needs nothing but `arrays` and its worker's numbers.

        Then every admitted gradient is dense and a step of its own, its correction is a factor, and no receipt is held
        back.
        """
        correction = self._correction
        changes_values = correction.elementwise or correction.shifts or self.spec.compression.name != "none"
        return self._mode.steps_alone and not (changes_values or self._is_observed or self._parked)

    def arrays(self) -> PushArrays:
        """Return the arrays that a push changes if `steps_alone` is True. They stay the same for the server's life."""
        tally = self._tally
        return PushArrays(
            self._version,
            self._published.counts,
            self._weights,
            np.empty(0, np.float32) if self._average is None else self._average.values,
            *self._optimizer.slots,
            self._optimizer.steps,
            self._settled.bitmaps,
            self._settled.progress,
            tally.outcomes,
            tally.counts,
            tally.times,
            tally.staleness,
            tally.losses,
            tally.loss_epochs,
            self._correction.means if isinstance(self._correction, Rescaled) else np.zeros(2),
            self.journal.block,
            self.journal.filled,
        )

    def live_worker(self, worker: str) -> LiveWorker | None:
        """Return the numbers of a worker that has joined; None for another one."""
        return self._round.live.get(worker)

    @property
    def clocks(self) -> dict[str, int]:
        """Clock of each live worker: its number of pushes, made equal for all workers at an epoch's end."""
        return {name: worker.clock for name, worker in self._round.live.items()}

    @property
    def can_save(self) -> bool:
        """Return True if `state()` would be complete: no state contains the open round of a mode in lock-step."""
        return not (self._aggregator.keeps and len(self._aggregator))

    def join(self, worker: str, now: float) -> tuple[Receipt, ...]:
        """Wait for a worker from now on, because it got a lease. Its clock starts at that of the slowest worker.

        Returns:
            No receipts: a worker that joins cannot close a round.
        """
        if worker not in self._round.live:
            self._round.live[worker] = LiveWorker(self._round.slowest_clock, now)
        self.journal.member(RecordKind.JOIN, now, worker, self.version)
        return ()

    def leave(self, worker: str, now: float) -> tuple[Receipt, ...]:
        """Stop waiting for a worker that is idle, gone or dead. The gradients that it pushed stay in the open round.

        Returns:
            The receipts that are due now, as the open round may have waited for this worker only.
        """
        left = self._round.live.pop(worker, None)
        if left is not None:
            left.leave()
        self._correction.leave(worker)
        self._close_if_due(now)
        self.journal.member(RecordKind.LEAVE, now, worker, self.version)
        return self._release_receipts()

    def change(self, settings: Settings, now: float) -> tuple[Receipt, ...]:
        """Continue with other settings. The gradients of the open round become a step first.

        Returns:
            The receipts of all workers that do not have to wait under the new settings.
        """
        while self._round.collected:
            self._close(now)
        self._round.pushed.clear()
        self._use_settings(settings)
        self.journal.change(now, settings, self.version)
        return self._release_receipts()

    def push(self, gradient: Gradient, now: float) -> tuple[Receipt, ...]:
        """Take one gradient through the six hooks.

        Args:
            gradient: a push that `check` did not refuse.
            now: time of the server's clock, seconds.

        Returns:
            Every receipt that is due now: the one of this push, those of workers that waited for it, or none.
        """
        updates = self._numbers[UPDATES]
        round_ = self._round
        worker = round_.live.get(gradient.worker)
        gradient = self._tally.arrived(gradient, worker, now)
        self._observer.pushed(gradient)
        outcome = self._admit(gradient)
        if outcome is BUFFERED:
            values = self._decode(gradient)
            if _is_finite(values) and (gradient.weights_read is None or _is_finite(gradient.weights_read)):
                self._collect(gradient, values, worker)
            else:
                outcome = Outcome.REJECTED
        if outcome is not BUFFERED:
            self._tally.refused(gradient, outcome)
            self._refused_epoch = max(self._refused_epoch, gradient.batch.epoch)
            if outcome is Outcome.DISCARDED:
                self._skip(gradient.batch)
        if worker is not None:
            worker.clock += 1
        if self._mode.belongs(outcome):
            round_.pushed.add(gradient.worker)
        outcome_on_arrival = outcome
        self._close_if_due(now)
        version = self.version
        if outcome is BUFFERED and version.updates > updates:
            outcome = APPLIED
        self.journal.push(now, gradient, outcome, version)
        if not self._parked and not self._mode.waiting(round_)(gradient.worker):  # the usual case
            return (Receipt(gradient.worker, gradient.batch, outcome, version),)
        self._parked.append(_Parked(gradient.worker, gradient.batch, outcome_on_arrival, updates))
        return self._release_receipts()

    def skip(self, batch: BatchId, now: float) -> tuple[Receipt, ...]:
        """Settle a batch without its gradient, as if it had been discarded. No-op if the batch is settled already.

        Args:
            batch: the batch to skip.
            now: time of the server's clock, seconds.

        Returns:
            The receipts that are due now, as the open round may have waited for this batch only.
        """
        if batch not in self._settled:
            self._skip(batch)
            self.journal.skip(now, batch, self.grid.examples(batch), self.version)
            self._close_if_due(now)
        return self._release_receipts()

    def _skip(self, batch: BatchId) -> None:
        self._settled.add(batch, skip=True)
        self._tally.skipped(self.grid.examples(batch))
        self._observer.skipped(batch)

    # ADMIT

    def _admit(self, gradient: Gradient) -> Outcome:
        if gradient.batch in self._settled:
            return Outcome.DUPLICATE
        if not (isfinite(gradient.norm) and isfinite(gradient.loss)):
            return Outcome.REJECTED
        if not self._in_history(gradient.read):
            return Outcome.REQUEUED
        if not self._mode.admits(self._numbers[UPDATES] - gradient.read.updates):
            return self._late_outcome
        return BUFFERED

    def _in_history(self, read: Version) -> bool:
        """Return True if the present weights come from those of version `read`; False if those were rolled back."""
        end = self._numbers[UPDATES]
        for incarnation, fork in reversed(self._history):
            if read.incarnation == incarnation:
                return fork <= read.updates <= end
            end = fork
        return False

    def check(self, gradient: Gradient) -> None:
        """Refuse a push that no worker of this run sends. A host calls this before `push`.

        Raises:
            PushRefusedError: the push does not fit this partition. The state is as before.
        """
        self._push_check.check(gradient, self._settled.epochs, self._decoded)

    # DECODE, CORRECT, AGGREGATE

    def _collect(self, gradient: Gradient, values: FloatArray, worker: LiveWorker | None) -> None:
        self._observer.collected(gradient)
        staleness = self._numbers[UPDATES] - gradient.read.updates
        weight = self._mode.weight(staleness) * self._correction.factor(gradient, staleness, worker)
        scale = 1.0
        if self._corrects:
            values, scale = self._correct(gradient, values, self._clip_factor(gradient))
        self._settled.add(gradient.batch)
        member = StepMember(gradient.read.updates, gradient.examples)
        self._aggregator.add(Contribution(gradient.worker, gradient.batch, member, values, scale, weight))
        self._round.collected += 1
        self._tally.collected(gradient)

    def _decode(self, gradient: Gradient) -> FloatArray:
        if not isinstance(gradient.values, Encoded):
            return gradient.values
        out = np.empty_like(self._decoded) if self._aggregator.keeps else self._decoded
        trainable = self.partition.num_trainable
        decode(gradient.values, out[:trainable])
        out[trainable:] = 0 if gradient.buffers is None else gradient.buffers
        return out

    def _clip_factor(self, gradient: Gradient) -> float:
        """Return the factor that shortens the whole gradient to `max_grad_norm`; 1 if it is no longer than that."""
        if self._max_norm is None:
            return 1.0
        return min(1.0, self._max_norm / (gradient.norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_

    def _correct(self, gradient: Gradient, values: FloatArray, scale: float) -> tuple[FloatArray, float]:
        """Apply `clip_value` and the correction to the values of a push.

        Args:
            gradient: the push.
            values: `[partition size]`, its decoded values, not modified.
            scale: factor of the trained values that is still to be applied.

        Returns:
            The values, and the factor that is still to be applied. A change element by element needs the scaled values;
            then the factor is 1. Without such a change, both are those given, which saves a pass over the values.
        """
        if self._clip_value is None and not self._correction.elementwise:
            return values, scale
        trainable = self.partition.num_trainable
        limit = self._clip_value
        out = np.empty_like(self._clipped) if self._aggregator.keeps else self._clipped
        np.multiply(values, scale, out=out)
        out[trainable:] = values[trainable:]  # the change of the buffers is no gradient: it is not clipped
        if limit is not None:
            np.clip(out[:trainable], -limit, limit, out=out[:trainable])
        read = None if gradient.weights_read is None else gradient.weights_read[:trainable]
        out[:trainable] = self._correction.correct(gradient.worker, out[:trainable], self._trained, read)
        return out, 1.0

    # STEP, REPLY

    def _close_if_due(self, now: float) -> None:
        """Close the open round if the mode says so, and keep the weights if an epoch is complete now."""
        self._round.outstanding = not self._settled.between_epochs or self._refused_epoch >= self._settled.epochs
        self._aggregator.set_live(self._round.live.keys())
        while self._mode.closes(self._round):  # at an epoch's end, the remaining gradients may need two steps
            self._close(now)
            self._aggregator.set_live(self._round.live.keys())
        if self._epoch_weights.newest < self._settled.epochs:
            self._keep_epoch_weights()
        if not self._round.outstanding:  # at an epoch's end all receipts are released
            self._round.level_clocks()

    def _close(self, now: float) -> None:
        """Close the open round: make a step of its gradients, if there are any."""
        self._round.pushed.clear()
        if not self._round.collected:
            return
        step = self._aggregator.close()
        updates = self._numbers[UPDATES] + 1
        self._published.begin()
        self._step(step, updates)
        self._numbers[UPDATES] = updates
        self._published.end(self.version)
        self._tally.stepped(step.members, updates, now)
        self._round.collected = len(self._aggregator)
        self._observer.stepped(self)

    def _step(self, step: Step, updates: int) -> None:
        trainable = self.partition.num_trainable
        gradient = step.gradient
        rate = self._schedule.rate(self._tally.counted)
        trained = gradient[:trainable] if self._has_buffers else gradient
        self._optimizer.step(self._trained, trained, rate * step.weight, self._correction.watch())
        if self._average is not None:
            self._average.update(self._trained, updates)
        if self._has_buffers:
            self._weights[trainable:] -= gradient[trainable:]
        if self._correction.shifts:
            self._correction.publish(self._trained, rate, self.published[:trainable])
            self.published[trainable:] = self._weights[trainable:]

    def _release_receipts(self) -> tuple[Receipt, ...]:
        """Return the parked receipts of all workers that do not have to wait any longer."""
        if not self._parked:
            return ()
        waits = self._mode.waiting(self._round)
        version = self.version
        released: list[Receipt] = []
        still_parked: list[_Parked] = []
        for push in self._parked:
            if waits(push.worker):
                still_parked.append(push)
                continue
            applied = push.outcome is BUFFERED and version.updates > push.updates
            released.append(Receipt(push.worker, push.batch, APPLIED if applied else push.outcome, version))
        self._parked = still_parked
        return tuple(released)

    def _keep_epoch_weights(self) -> None:
        self._tally.forget(self.epochs)
        self._epoch_weights.keep(self.epochs, self._weights_to_evaluate)

    def _weights_to_evaluate(self) -> FloatArray:
        weights = self._weights.copy()
        if self._average is not None:
            weights[: self.partition.num_trainable] = self._average.values
        return weights

    def epoch_weights(self, epochs: int | None) -> FloatArray:
        """Return a copy of the weights to evaluate, or of their average if the job keeps one.

        Args:
            epochs: number of complete epochs at the moment of the copy; None: now.

        Raises:
            WeightsNotKeptError: the end of that epoch is not one of the newest, or was before this server began.
        """
        return self._weights_to_evaluate() if epochs is None else self._epoch_weights.at(epochs)

    @property
    def weights(self) -> FloatArray:
        """A copy of the weights that the optimizer updates; workers may pull, and evaluations use, other ones."""
        return self._weights.copy()

    # Reports and states

    def report(self) -> Report:
        """Return the version, the applied set and the counters, as the driver needs them."""
        tally = self._tally
        version = self.version
        pushes = {outcome.value: count for outcome, count in tally.pushes().items()}
        pushes[Outcome.BUFFERED.value] = self._round.collected
        return Report(
            self.partition.number,
            version,
            self._settled.epochs,
            self._settled.settled(),
            pushes,
            tally.staleness_counts(),
            tally.epoch_losses(),
            tally.samples,
            {name: worker.pushes for name, worker in self._round.live.items()},
            frozenset(push.worker for push in self._parked),
            tally.bytes,
            tally.first,
            tally.last(version.updates),
            tally.longest_s,
            tally.rejected(),
        )

    def state(self) -> ServerState:
        """Return everything that `restore` needs, copied. Call it only if `can_save` is True."""
        assert self.can_save, "a round is open: its gradients are in the applied set, but in no state"
        aggregator_arrays, aggregator_metadata = self._aggregator.state()
        correction_arrays, correction_metadata = self._correction.state()
        parts: dict[str, Mapping[Any, NDArray[Any]]] = {
            "settled": self._settled.settled(),
            "skipped": self._settled.skipped(),
            "optimizer": {name: array.copy() for name, array in self._optimizer.state().items()},
            "aggregator": aggregator_arrays,
            "correction": correction_arrays,
        }
        arrays = {f"{part}.{name}": array for part, named in parts.items() for name, array in named.items()}
        metadata = {
            "version": list(self.version),
            "history": [list(fork) for fork in self._history],
            "partition": list(self.partition),
            "epochs": self._settled.epochs,
            "aggregator": aggregator_metadata,
            "correction": correction_metadata,
            "settings": self.settings.model_dump(mode="json"),
            "changes": [settings.model_dump(mode="json") for settings in self.journal.settings],
        } | self._tally.state()
        if self._average is not None:
            arrays["average"] = self._average.values.copy()
        state = ServerState({"weights": self._weights.copy()} | arrays, metadata)
        self._observer.saved(self, state)
        return state

    @classmethod
    def restore(
        cls,
        spec: JobSpec,
        grid: EpochGrid,
        state: ServerState,
        incarnation: int,
        now: float,
        published: Published | None = None,
        observer: ServerObserver | None = None,
    ) -> Self:
        """Build a new incarnation of a server from a state. Its number of updates continues from that of the state.

        Args:
            spec: the job to train.
            grid: batches by shard, and number of examples in an epoch.
            state: state of the partition, from `state()` or from `repartition`.
            incarnation: number of the new incarnation.
            now: time of the server's clock, seconds.
            published: vector from which workers pull; None: private memory of this server.
            observer: object that is notified of every change of the state; None: no notifications.
        """
        version = Version(incarnation, state.version.updates)
        server = cls(spec, state.partition, state.arrays["weights"], grid, version, published, observer)
        server._use_settings(state.settings)
        server._history = state.history + server._history
        server._settled = AppliedSet(grid, state.epochs, state.bitmaps("settled"), state.bitmaps("skipped"))
        server._optimizer.load(state.part("optimizer"))
        if server._average is not None:
            server._average.values[:] = state.arrays["average"]
        server._aggregator.load(state.part("aggregator"), state.metadata["aggregator"])
        server._correction.load(state.part("correction"), state.metadata["correction"])
        server._round.collected = len(server._aggregator)
        server._tally.load(state.metadata)
        server._epoch_weights = EpochWeights(state.epochs)
        if server._settled.between_epochs:
            server._keep_epoch_weights()
        server.journal.settings += state.changes
        server.journal.fork(now, state.version, version)
        server._observer.restored(server, state)
        return server


def _is_finite(vector: FloatArray) -> bool:
    """Return True if all values are finite. A worker's word for it, the norm, may be wrong.

    The scalar product is read off in half the time of a test of every value. It is finite unless a value is not, or the
    values are so large that their squares overflow.
    """
    with np.errstate(over="ignore"):
        square = vector.dot(vector)
    return isfinite(square) or bool(np.isfinite(vector).all())
