"""ParameterServer: one partition of the weights and everything that decides what happens to it.

A push goes through six hooks:

    ADMIT      is the batch new, finite, and read in this server's history? does the mode take it?
    DECODE     values as sent -> float32
    CORRECT    what the whole gradient's norm asks (clipping), and what staleness does
    AGGREGATE  into the round; when it closes, the round's mean
    STEP       the optimizer, in place
    REPLY      the weights workers are shown, and the receipts now due

The host calls one method at a time and delivers the receipts each returns.
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
from psgd.core.server.corrections import build_correction
from psgd.core.server.journal import Journal, RecordKind
from psgd.core.server.observer import ServerObserver
from psgd.core.server.optimizers import build_optimizer
from psgd.core.server.partitions import Partition
from psgd.core.server.published import PrivateVector, Published
from psgd.core.server.push_check import PushCheck
from psgd.core.server.report import Mark, Report
from psgd.core.server.schedules import build_schedule
from psgd.core.server.state import ServerState
from psgd.core.server.tally import Tally
from psgd.errors import WeightsNotKeptError
from psgd.spec import JobSpec, Settings
from psgd_workers.gradients.compression import decode
from psgd_workers.messages import BatchId, Encoded, EpochGrid, FloatArray, Gradient, Outcome, Receipt, Version

__all__ = ["ParameterServer"]

KEPT_EPOCHS = 2  # the two newest ends, of which one may be under evaluation


class _Parked(NamedTuple):
    """A push whose receipt is not yet given."""

    worker: str
    batch: BatchId
    outcome: Outcome
    updates: int  # of the server when it came: a later version has it applied


class ParameterServer:
    """One partition of the weights.

    Args:
        spec: the job.
        partition: which slice of the weights `weights` is.
        weights: `[partition size]` float32; copied.
        grid: the shape of an epoch.
        version: where versions start.
        published: where to keep the weights that workers are shown; None: in memory of its own.
        observer: is told what happens to the state.
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
        self.partition = partition
        self.version = version
        self.settings = spec.settings
        self._observer = observer or ServerObserver()
        self._size = size
        self._correction = build_correction(spec, trainable)
        self._board = published or PrivateVector(size)
        self._board.begin()
        np.copyto(self._board.values, weights)
        self._board.end(version)
        # What workers are shown is the weights themselves, unless a correction shows them others.
        self._weights = self._board.values.copy() if self._correction.shifts else self._board.values
        self._trained = self._weights[:trainable]
        self._has_buffers = trainable < size
        self._clipped = np.empty(size, np.float32)
        self._decoded = np.empty(size, np.float32)
        self._push_check = PushCheck(spec, partition, grid)
        self._optimizer = build_optimizer(spec.optimizer, trainable)
        decay = spec.optimizer.ema
        self._average = None if decay is None else Average(decay, self._trained)
        self._grid = grid
        self._settled = AppliedSet(grid)
        self._history = [(version.incarnation, version.updates)]  # (incarnation, updates it forked at), oldest first
        self._round = Round()
        self._refused = -1  # the newest epoch of which a batch was refused: one that has begun, if it is not complete
        self._parked: list[_Parked] = []
        self._tally = Tally()
        self._epoch_weights: dict[int, FloatArray] = {}
        self._kept = 0  # the newest epoch's end that weights were kept of, or could have been
        self._counted = 0  # examples applied and skipped: what the schedule goes by
        self.journal = Journal(spec.scaling.servers)
        self._set(spec.settings)
        self._observer.started(self)

    def _set(self, settings: Settings) -> None:
        self.settings = settings
        self._mode = build_consistency(settings.consistency)
        self._late = Outcome.DISCARDED if settings.consistency.discards_late else Outcome.REQUEUED
        self._aggregator = self._mode.aggregator(self._size, self.partition.num_trainable)
        optimizer = settings.optimizer
        self._max_norm = optimizer.max_grad_norm
        self._clip_value = optimizer.clip_value
        self._correction.rate = optimizer.lr
        self._untouched = self._max_norm is None and self._clip_value is None and not self._correction.elementwise
        self._schedule = build_schedule(optimizer.schedule, optimizer.lr, self._grid.num_examples)

    @property
    def published(self) -> FloatArray:
        """The weights that workers are shown; they change with the next step."""
        return self._board.values

    @property
    def epochs(self) -> int:
        """Complete epochs: every batch of those before this one is in the state, or skipped."""
        return self._settled.epochs

    @property
    def samples(self) -> int:
        """Examples applied."""
        return self._tally.samples

    @property
    def can_save(self) -> bool:
        """Whether `state()` would hold everything: an open round of a mode in lock-step is in no state."""
        return not (self._aggregator.keeps and len(self._aggregator))

    def join(self, worker: str, now: float) -> tuple[Receipt, ...]:
        """A worker got a lease: rounds wait for it from now on. It enters at the slowest one's clock."""
        live = self._round.live
        live.setdefault(worker, min(live.values(), default=0))
        self._tally.joined(worker, now)
        self.journal.member(RecordKind.JOIN, now, worker, self.version)
        return ()

    def leave(self, worker: str, now: float) -> tuple[Receipt, ...]:
        """A worker is idle, gone or dead: rounds no longer wait for it. What it pushed stays."""
        self._round.live.pop(worker, None)
        self._correction.leave(worker)
        self._tally.left(worker)
        self._close_if_due(now)
        self.journal.member(RecordKind.LEAVE, now, worker, self.version)
        return self._due()

    def change(self, settings: Settings, now: float) -> tuple[Receipt, ...]:
        """Go on by other settings: what is collected becomes a step first, and everybody is let go."""
        while self._round.collected:
            self._close(now)
        self._round.heard.clear()
        self._set(settings)
        self.journal.change(now, settings, self.version)
        return self._due()

    def push(self, gradient: Gradient, now: float) -> tuple[Receipt, ...]:
        """Take one gradient through the six hooks.

        Returns:
            Every receipt that is due now: this worker's, those of workers that waited for it, or none.
        """
        updates = self.version.updates
        round_ = self._round
        gradient = self._tally.arrived(gradient, now)
        self._observer.pushed(gradient)
        outcome = self._admit(gradient)
        if outcome is Outcome.BUFFERED:
            self._collect(gradient)
        else:
            self._tally.refused(gradient, outcome)
            self._refused = max(self._refused, gradient.batch.epoch)
            if outcome is Outcome.DISCARDED:
                self._settled.add(gradient.batch, skip=True)
                self._counted += gradient.examples
                self._observer.skipped(gradient.batch)
        if gradient.worker in round_.live:
            round_.live[gradient.worker] += 1
        if self._mode.belongs(outcome):
            round_.heard.add(gradient.worker)
        taken = outcome
        self._close_if_due(now)
        if outcome is Outcome.BUFFERED and self.version.updates > updates:
            outcome = Outcome.APPLIED
        self.journal.push(now, gradient, outcome, self.version)
        if not self._parked and not self._mode.waiting(round_)(gradient.worker):  # the usual case
            return (Receipt(gradient.worker, gradient.batch, outcome, self.version),)
        self._parked.append(_Parked(gradient.worker, gradient.batch, taken, updates))
        return self._due()

    def skip(self, batch: BatchId, examples: int, now: float) -> tuple[Receipt, ...]:
        """Do without a batch, which is settled from now on as if it had been discarded; nothing, if it is settled."""
        if batch not in self._settled:
            self._settled.add(batch, skip=True)
            self._counted += examples
            self._observer.skipped(batch)
            self.journal.skip(now, batch, examples, self.version)
            self._close_if_due(now)
        return self._due()

    # ADMIT

    def _admit(self, gradient: Gradient) -> Outcome:
        if gradient.batch in self._settled:
            return Outcome.DUPLICATE
        if not (isfinite(gradient.norm) and isfinite(gradient.loss)):
            return Outcome.REJECTED
        if not self._in_history(gradient.read):
            return Outcome.REQUEUED
        if not self._mode.admits(self.version.updates - gradient.read.updates):
            return self._late
        return Outcome.BUFFERED

    def _in_history(self, read: Version) -> bool:
        """Whether the weights of that version are ancestors of these."""
        end = self.version.updates
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

    def _collect(self, gradient: Gradient) -> None:
        self._observer.collected(gradient)
        staleness = self.version.updates - gradient.read.updates
        weight = self._mode.weight(staleness) * self._correction.factor(gradient, staleness)
        values = self._decode(gradient)
        scale = 1.0
        if not self._untouched:
            values, scale = self._correct(gradient, values, self._clip(gradient))
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

    def _clip(self, gradient: Gradient) -> float:
        if self._max_norm is None:
            return 1.0
        return min(1.0, self._max_norm / (gradient.norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_

    def _correct(self, gradient: Gradient, values: FloatArray, scale: float) -> tuple[FloatArray, float]:
        """What the whole gradient is multiplied by stays a factor, unless its values change one by one."""
        if self._clip_value is None and not self._correction.elementwise:
            return values, scale
        trainable = self.partition.num_trainable
        limit = self._clip_value
        out = np.empty_like(self._clipped) if self._aggregator.keeps else self._clipped
        np.multiply(values, scale, out=out)
        out[trainable:] = values[trainable:]  # buffers are no gradients
        if limit is not None:
            np.clip(out[:trainable], -limit, limit, out=out[:trainable])
        read = None if gradient.weights_read is None else gradient.weights_read[:trainable]
        out[:trainable] = self._correction.correct(gradient.worker, out[:trainable], self._trained, read)
        return out, 1.0

    # STEP, REPLY

    def _close_if_due(self, now: float) -> None:
        self._round.outstanding = not self._settled.between_epochs or self._refused >= self._settled.epochs
        self._aggregator.follow(self._round.live.keys())
        while self._mode.closes(self._round):  # an epoch's end may make two steps of what is left
            self._close(now)
            self._aggregator.follow(self._round.live.keys())
        if self._kept < self._settled.epochs:
            self._keep_epoch_weights()
        if self._round.outstanding:
            return
        live = self._round.live  # everybody is let go at an epoch's end: nobody is ahead at the next one's start
        self._round.live = dict.fromkeys(live, max(live.values(), default=0))

    def _close(self, now: float) -> None:
        self._round.heard.clear()
        if not self._round.collected:
            return
        step = self._aggregator.close()
        self._board.begin()
        self._step(step)
        self._board.end(version := Version(self.version.incarnation, self.version.updates + 1))
        self._counted += self._tally.stepped(step.members, version.updates, now)
        self._round.collected = len(self._aggregator)
        self.version = version
        self._observer.stepped(self)

    def _step(self, step: Step) -> None:
        trainable = self.partition.num_trainable
        gradient = step.gradient
        rate = self._schedule.rate(self._counted)
        trained = gradient[:trainable] if self._has_buffers else gradient
        self._optimizer.step(self._trained, trained, rate * step.weight, self._correction.watch())
        if self._average is not None:
            self._average.take(self._trained, self.version.updates + 1)
        if self._has_buffers:
            self._weights[trainable:] -= gradient[trainable:]
        if self._correction.shifts:
            self._correction.published(self._trained, rate, self.published[:trainable])
            self.published[trainable:] = self._weights[trainable:]

    def _due(self) -> tuple[Receipt, ...]:
        """The receipts that nothing holds back any more."""
        if not self._parked:
            return ()
        waits = self._mode.waiting(self._round)
        version = self.version
        due: list[Receipt] = []
        held: list[_Parked] = []
        for push in self._parked:
            if waits(push.worker):
                held.append(push)
                continue
            applied = push.outcome is Outcome.BUFFERED and version.updates > push.updates
            due.append(Receipt(push.worker, push.batch, Outcome.APPLIED if applied else push.outcome, version))
        self._parked = held
        return tuple(due)

    def _keep_epoch_weights(self) -> None:
        self._kept = self.epochs
        self._tally.forget(self.epochs)
        self._epoch_weights[self._kept] = self._to_evaluate()
        for old in sorted(self._epoch_weights)[:-KEPT_EPOCHS]:
            del self._epoch_weights[old]

    def _to_evaluate(self) -> FloatArray:
        weights = self._weights.copy()
        if self._average is not None:
            weights[: self.partition.num_trainable] = self._average.values
        return weights

    def epoch_weights(self, epochs: int | None) -> FloatArray:
        """Return a copy of what is to be evaluated: the weights, or their average if the job keeps one.

        Args:
            epochs: number of complete epochs whose end is meant; None: the present moment.

        Raises:
            WeightsNotKeptError: the end of that epoch is not one of the two newest.
        """
        if epochs is None:
            return self._to_evaluate()
        if epochs not in self._epoch_weights:
            kept = ", ".join(map(str, sorted(self._epoch_weights))) or "none"
            raise WeightsNotKeptError(f"the weights after {epochs} epochs are not kept; epochs kept: {kept}")
        return self._epoch_weights[epochs].copy()

    @property
    def weights(self) -> FloatArray:
        """A copy of the weights, whatever workers are shown and whatever is evaluated."""
        return self._weights.copy()

    # What others may know

    def report(self) -> Report:
        """What the driver may know and believe."""
        tally = self._tally
        updates = self.version.updates
        pushes = {outcome.value: tally.pushes[outcome] for outcome in Outcome}
        pushes[Outcome.BUFFERED.value] = self._round.collected
        return Report(
            self.partition.number,
            self.version,
            self._settled.epochs,
            self._settled.settled(),
            pushes,
            dict(tally.staleness),
            tally.losses(),
            tally.samples,
            dict(self._round.live),
            frozenset(push.worker for push in self._parked),
            tally.bytes,
            tally.first,
            None if tally.stepped_at is None else Mark(tally.stepped_at, updates, tally.samples),
            tally.longest_s,
            tally.rejected(),
        )

    def state(self) -> ServerState:
        """Everything `restore` needs. Only while `can_save`."""
        assert self.can_save, "a round is open: its gradients are in the applied set, but in no state"
        collected, collecting = self._aggregator.state()
        corrected, correcting = self._correction.state()
        parts: dict[str, Mapping[Any, NDArray[Any]]] = {
            "settled": self._settled.settled(),
            "skipped": self._settled.skipped(),
            "optimizer": {name: array.copy() for name, array in self._optimizer.state().items()},
            "aggregator": collected,
            "correction": corrected,
        }
        arrays = {f"{part}.{name}": array for part, named in parts.items() for name, array in named.items()}
        metadata = {
            "version": list(self.version),
            "history": [list(fork) for fork in self._history],
            "partition": list(self.partition),
            "epochs": self._settled.epochs,
            "counted": self._counted,
            "aggregator": collecting,
            "correction": correcting,
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
        """A new incarnation of the partition that `state` was taken of, its versions counting on from there."""
        metadata = state.metadata
        origin = Version(*metadata["version"])
        version = Version(incarnation, origin.updates)
        server = cls(
            spec, Partition(*metadata["partition"]), state.arrays["weights"], grid, version, published, observer
        )
        server._set(Settings.model_validate(metadata["settings"]))
        server._history = [tuple(fork) for fork in metadata["history"]] + server._history
        settled, skipped = (
            {int(epoch): bitmap for epoch, bitmap in state.part(name).items()} for name in ("settled", "skipped")
        )
        server._settled = AppliedSet(grid, metadata["epochs"], settled, skipped)
        server._optimizer.load(state.part("optimizer"))
        if server._average is not None:
            server._average.values[:] = state.arrays["average"]
        server._aggregator.load(state.part("aggregator"), metadata["aggregator"])
        server._correction.load(state.part("correction"), metadata["correction"])
        server._round.collected = len(server._aggregator)
        server._counted = metadata["counted"]
        server._tally.load(metadata)
        server._kept = server.epochs
        if server._settled.between_epochs:
            server._keep_epoch_weights()
        server.journal.settings += [Settings.model_validate(settings) for settings in metadata["changes"]]
        server.journal.fork(now, origin, server.version)
        server._observer.restored(server, state)
        return server
