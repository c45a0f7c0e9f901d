"""ParameterServer: one partition of the weights and everything that decides what happens to it.

A push goes through six hooks:

    ADMIT      is the batch new, finite, and read in this server's history?
    DECODE     values as sent -> float32            (nothing is compressed yet)
    CORRECT    what the whole gradient's norm asks  (clipping)
    AGGREGATE  into the round; when it closes, the round's mean
    STEP       the optimizer, in place
    REPLY      the weights workers are shown, and the receipts now due

The host calls one method at a time and delivers the receipts each returns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from psgd.core.applied import AppliedSet
from psgd.core.consistency import build_consistency
from psgd.core.journal import Journal, Kind
from psgd.core.optimizers import build_optimizer
from psgd.core.report import EpochLoss, Mark, Report
from psgd.spec import JobSpec
from psgd_workers.messages import BatchId, EpochGrid, FloatArray, Gradient, Outcome, Receipt, Version

__all__ = ["ParameterServer", "Partition", "ServerState"]

LOSS_EPOCHS = 2  # the open one and the newest complete one


class Partition(NamedTuple):
    """Which slice of the weights a server holds."""

    number: int
    start: int
    stop: int
    num_trainable: int  # values of the slice before the first buffer


@dataclass(frozen=True, slots=True)
class ServerState:
    """A partition's whole state: what a checkpoint holds. Arrays are copies."""

    arrays: Mapping[str, NDArray[Any]]  # weights, applied.EPOCH, optimizer.NAME
    facts: Mapping[str, Any]  # plain JSON values


@dataclass(slots=True)
class _Round:
    """Pushes since the last step."""

    gradients: list[Gradient] = field(default_factory=list)
    parked: list[tuple[str, BatchId, Outcome]] = field(default_factory=list)  # receipts not yet given
    heard: set[str] = field(default_factory=set)


class ParameterServer:
    """One partition of the weights.

    Args:
        spec: the job.
        partition: which slice of the weights `weights` is.
        weights: `[partition size]` float32; copied.
        grid: the shape of an epoch.
        version: where versions start.
    """

    def __init__(
        self,
        spec: JobSpec,
        partition: Partition,
        weights: FloatArray,
        grid: EpochGrid,
        version: Version,
    ) -> None:
        assert weights.shape == (partition.stop - partition.start,), (weights.shape, partition)
        self.partition = partition
        self.version = version
        self._max_norm = spec.optimizer.max_grad_norm
        self._weights = weights.astype(np.float32, copy=True)
        self._mean = np.empty_like(self._weights)
        self._scratch = np.empty_like(self._weights)
        self._optimizer = build_optimizer(spec.optimizer, partition.num_trainable)
        self._mode = build_consistency(spec.consistency)
        self._grid = grid
        self._applied = AppliedSet(grid)
        self._history = [(version.incarnation, version.updates)]  # (incarnation, updates it forked at), oldest first
        self._live: dict[str, int] = {}  # worker -> pushes heard since it joined
        self._round = _Round()
        self._pushes = Counter[Outcome]()
        self._staleness = Counter[int]()
        self._losses: dict[int, EpochLoss] = {}
        self._epoch_weights: dict[int, FloatArray] = {}
        self._samples = 0
        self._first: Mark | None = None
        self._last: Mark | None = None
        self.journal = Journal()

    @property
    def published(self) -> FloatArray:
        """The weights that workers are shown; they change with the next step."""
        return self._weights

    @property
    def epochs(self) -> int:
        """Complete epochs: every batch of those before this one is in the state."""
        return self._applied.epochs

    @property
    def between_rounds(self) -> bool:
        """Whether no gradient waits for its round to close: only then can the state be saved."""
        return not self._round.gradients

    def join(self, worker: str, now: float) -> tuple[Receipt, ...]:
        """A worker got a lease: rounds wait for it from now on."""
        self._live.setdefault(worker, 0)
        self.journal.member(Kind.JOIN, now, worker, self.version)
        return ()

    def leave(self, worker: str, now: float) -> tuple[Receipt, ...]:
        """A worker is idle, gone or dead: rounds no longer wait for it. What it pushed stays."""
        self._live.pop(worker, None)
        receipts = self._close_round(now)
        self.journal.member(Kind.LEAVE, now, worker, self.version)
        return receipts

    def push(self, gradient: Gradient, now: float) -> tuple[Receipt, ...]:
        """Take one gradient through the six hooks.

        Returns:
            Every receipt that is due now: this worker's, those of workers that waited for it, or none.
        """
        outcome = self._admit(gradient)
        if outcome is Outcome.BUFFERED:
            self._applied.add(gradient.batch)
            self._round.gradients.append(gradient)
            self._note_loss(gradient)
        else:
            self._pushes[outcome] += 1
        if gradient.worker in self._live:
            self._live[gradient.worker] += 1
        self._round.heard.add(gradient.worker)
        self._round.parked.append((gradient.worker, gradient.batch, outcome))
        receipts = self._close_round(now)
        if receipts and outcome is Outcome.BUFFERED:
            outcome = Outcome.APPLIED
        self.journal.push(now, gradient, outcome, self.version)
        return receipts

    def _admit(self, gradient: Gradient) -> Outcome:
        if gradient.batch in self._applied:
            return Outcome.DUPLICATE
        if not (isfinite(gradient.norm) and isfinite(gradient.loss)):
            return Outcome.REJECTED
        if not self._in_history(gradient.read) or not self._mode.admits(gradient, self.version):
            return Outcome.REQUEUED
        return Outcome.BUFFERED

    def _in_history(self, read: Version) -> bool:
        """Whether the weights of that version are ancestors of these."""
        ends = [fork for _, fork in self._history[1:]] + [self.version.updates]
        return any(
            read.incarnation == incarnation and fork <= read.updates <= end
            for (incarnation, fork), end in zip(self._history, ends, strict=True)
        )

    def _close_round(self, now: float) -> tuple[Receipt, ...]:
        if not self._mode.closes(self._round.heard, self._live.keys(), outstanding=not self._applied.between_epochs):
            return ()
        done, self._round = self._round, _Round()
        if done.gradients:
            self._step(done.gradients, now)
        return tuple(
            Receipt(worker, batch, Outcome.APPLIED if outcome is Outcome.BUFFERED else outcome, self.version)
            for worker, batch, outcome in done.parked
        )

    def _step(self, gradients: Sequence[Gradient], now: float) -> None:
        trainable = self.partition.num_trainable
        mean = self._aggregate(sorted(gradients, key=lambda gradient: gradient.batch))
        self._optimizer.step(self._weights[:trainable], mean[:trainable])
        self._weights[trainable:] -= mean[trainable:]
        for gradient in gradients:
            self._staleness[self.version.updates - gradient.read.updates] += 1
            self._samples += gradient.examples
        self._pushes[Outcome.APPLIED] += len(gradients)
        self.version = self.version._replace(updates=self.version.updates + 1)
        self._last = Mark(now, self.version.updates, self._samples)
        self._first = self._first or self._last
        if self._applied.between_epochs:
            self._keep_epoch_weights()

    def _aggregate(self, gradients: Sequence[Gradient]) -> FloatArray:
        """Σ (nᵢ·N/Σn)·gᵢ / N, in the order given; with equal nᵢ the factors are exactly 1."""
        examples = sum(gradient.examples for gradient in gradients)
        factors = [gradient.examples * len(gradients) / examples for gradient in gradients]
        if len(gradients) == 1 and self._clip(gradients[0]) == 1:
            return gradients[0].values
        self._mean[:] = 0
        for gradient, factor in zip(gradients, factors, strict=True):
            self._mean += self._scaled(gradient, factor)
        self._mean /= len(gradients)
        return self._mean

    def _scaled(self, gradient: Gradient, factor: float) -> FloatArray:
        """CORRECT: a long gradient is shortened; buffers are no gradients and keep their change."""
        trainable = self.partition.num_trainable
        np.multiply(gradient.values[:trainable], factor * self._clip(gradient), out=self._scratch[:trainable])
        np.multiply(gradient.values[trainable:], factor, out=self._scratch[trainable:])
        return self._scratch

    def _clip(self, gradient: Gradient) -> float:
        if self._max_norm is None:
            return 1.0
        return min(1.0, self._max_norm / (gradient.norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_

    def _note_loss(self, gradient: Gradient) -> None:
        epoch = gradient.batch.epoch
        total, examples = self._losses.get(epoch, EpochLoss(0.0, 0))
        self._losses[epoch] = EpochLoss(total + gradient.loss * gradient.examples, examples + gradient.examples)
        for old in sorted(self._losses)[:-LOSS_EPOCHS]:
            del self._losses[old]

    def _keep_epoch_weights(self) -> None:
        self._epoch_weights[self._applied.epochs] = self._weights.copy()
        for old in sorted(self._epoch_weights)[:-LOSS_EPOCHS]:
            del self._epoch_weights[old]

    def epoch_weights(self, epochs: int | None) -> FloatArray:
        """A copy of the weights as they were the instant `epochs` epochs were complete; None: as they are.

        The two newest are kept; an older or a future one is a KeyError.
        """
        return self._weights.copy() if epochs is None else self._epoch_weights[epochs].copy()

    def report(self) -> Report:
        """What the driver may know and believe."""
        pushes = {outcome.value: self._pushes[outcome] for outcome in Outcome}
        pushes[Outcome.BUFFERED.value] = len(self._round.gradients)
        return Report(
            self.partition.number,
            self.version,
            self._applied.epochs,
            self._applied.bitmaps(),
            pushes,
            dict(self._staleness),
            dict(self._losses),
            self._samples,
            dict(self._live),
            frozenset(worker for worker, _, _ in self._round.parked),
            self._first,
            self._last,
        )

    def state(self) -> ServerState:
        """Everything `restore` needs. Only `between_rounds`."""
        assert self.between_rounds, "a round is open: its gradients are in the applied set, but not in the weights"
        arrays: dict[str, NDArray[Any]] = {"weights": self._weights.copy()}
        arrays |= {f"applied.{epoch}": bitmap for epoch, bitmap in self._applied.bitmaps().items()}
        arrays |= {f"optimizer.{name}": array.copy() for name, array in self._optimizer.state().items()}
        facts = {
            "version": list(self.version),
            "history": [list(fork) for fork in self._history],
            "partition": list(self.partition),
            "epochs": self._applied.epochs,
            "samples": self._samples,
            "pushes": {outcome.value: count for outcome, count in self._pushes.items()},
            "staleness": sorted(self._staleness.items()),
            "losses": [[epoch, *loss] for epoch, loss in sorted(self._losses.items())],
        }
        return ServerState(arrays, facts)

    @classmethod
    def restore(cls, spec: JobSpec, grid: EpochGrid, state: ServerState, incarnation: int, now: float) -> Self:
        """A new incarnation of the partition that `state` was taken of, its versions counting on from there."""
        arrays, facts = state.arrays, state.facts
        origin = Version(*facts["version"])
        server = cls(
            spec, Partition(*facts["partition"]), arrays["weights"], grid, Version(incarnation, origin.updates)
        )
        server._history = [tuple(fork) for fork in facts["history"]] + server._history
        bitmaps = {int(name.split(".")[1]): array for name, array in arrays.items() if name.startswith("applied.")}
        server._applied = AppliedSet(grid, facts["epochs"], bitmaps)
        prefix = "optimizer."
        server._optimizer.load({name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)})
        server._samples = facts["samples"]
        server._pushes.update({Outcome(name): count for name, count in facts["pushes"].items()})
        server._staleness.update({int(value): count for value, count in facts["staleness"]})
        server._losses = {epoch: EpochLoss(total, examples) for epoch, total, examples in facts["losses"]}
        if server._applied.between_epochs:
            server._keep_epoch_weights()
        server.journal.fork(now, origin, server.version)
        return server
