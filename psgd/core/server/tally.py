"""Tally: the counters of a server, over its pushes and steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import isnan, nan
from typing import Any

import numpy as np

from psgd.core.server.aggregators import StepMember
from psgd.core.server.live_worker import LiveWorker
from psgd.core.server.report import EpochLoss, Mark
from psgd_workers.messages import BatchId, Gradient, Outcome

__all__ = [
    "BYTES",
    "COUNTED",
    "FIRST_AT",
    "FIRST_SAMPLES",
    "FIRST_UPDATES",
    "JITTER_S",
    "LONGEST_S",
    "LOSS_EPOCHS",
    "MAX_STALENESS",
    "NO_EPOCH",
    "SAMPLES",
    "STEPPED_AT",
    "Tally",
]

OUTCOMES = tuple(Outcome)
CODES = {outcome: code for code, outcome in enumerate(OUTCOMES)}
APPLIED = CODES[Outcome.APPLIED]
SAMPLES, BYTES, COUNTED, FIRST_UPDATES, FIRST_SAMPLES = range(5)  # indices of `Tally.counts`
LONGEST_S, STEPPED_AT, FIRST_AT = range(3)  # indices of `Tally.times`
LOSS_EPOCHS = 2  # epochs whose loss is kept: the open one and the newest complete one
NO_EPOCH = -1
MAX_STALENESS = 4096  # length of the histogram of staleness; higher values are rare and counted one by one
JITTER_S = 0.01  # seconds by which a push may be slower to arrive than the worker's push before it


class Tally:
    """Counters of one partition. Most are saved with its state; the times are those of this process only.

    Attributes:
        outcomes: `[outcomes]`, int64: number of pushes of each outcome, in the order of `Outcome`. A refused push is
            counted when it arrives, an applied one when its step is made.
        counts: `[5]`, int64: examples applied; bytes of the vectors of all pushes; examples applied or skipped; and
            updates and examples after the first step of this process.
        times: `[3]`, float64, seconds: longest computing time of a batch in this process; times of the newest and of
            the first step of this process, nan before.
        staleness: `[MAX_STALENESS]`, int64: number of applied gradients of each staleness.
        losses: `[2]`, float64: loss of the applied examples, summed, of the epochs in `loss_epochs`.
        loss_epochs: `[2, 2]`, int64: epoch e and its number of applied examples, in row e mod 2; epoch -1: none.
    """

    def __init__(self) -> None:
        self.outcomes = np.zeros(len(OUTCOMES), np.int64)
        self.counts = np.zeros(5, np.int64)
        self.times = np.array([0.0, nan, nan])
        self.staleness = np.zeros(MAX_STALENESS, np.int64)
        self.losses = np.zeros(LOSS_EPOCHS)
        self.loss_epochs = np.array([[NO_EPOCH, 0]] * LOSS_EPOCHS)
        # Python reads and writes these in a third of the time.
        self._outcomes = self.outcomes.data
        self._counts = self.counts.data
        self._times: memoryview[Any] = self.times.data
        self._staleness = self.staleness.data
        self._losses: memoryview[Any] = self.losses.data
        self._loss_epochs = self.loss_epochs.data
        self._rare_staleness = Counter[int]()  # staleness of MAX_STALENESS and more -> number of applied gradients
        self._rejected = Counter[BatchId]()

    @property
    def samples(self) -> int:
        """Number of examples applied."""
        return self._counts[SAMPLES]

    @property
    def counted(self) -> int:
        """Number of examples applied or skipped; the schedule's rate depends on it."""
        return self._counts[COUNTED]

    def arrived(self, gradient: Gradient, worker: LiveWorker | None, now: float) -> Gradient:
        """Count a push and its bytes, and limit the computing time that its worker reported.

        A worker computes one batch at a time, so a batch took at most the time since the last push of its worker. For
        a worker that has no lease, that time is unknown, and the limit is next to 0.

        Args:
            gradient: the push.
            worker: the worker that sent it; None: it has no lease.
            now: time of the server's clock, seconds.

        Returns:
            The gradient, with `compute_s` limited to what the server's own clock allows.
        """
        self._counts[BYTES] += gradient.nbytes
        allowed_s = JITTER_S if worker is None else worker.pushed(now) + JITTER_S
        return gradient if gradient.compute_s <= allowed_s else gradient._replace(compute_s=allowed_s)

    def refused(self, gradient: Gradient, outcome: Outcome) -> None:
        """Count a push that did not enter a round."""
        self._outcomes[CODES[outcome]] += 1
        if outcome is Outcome.REJECTED:
            self._rejected[gradient.batch] += 1

    def skipped(self, examples: int) -> None:
        """Count the examples of a batch that was skipped."""
        self._counts[COUNTED] += examples

    def collected(self, gradient: Gradient) -> None:
        """Count the loss and the computing time of a gradient that entered a round."""
        if gradient.compute_s > self._times[LONGEST_S]:
            self._times[LONGEST_S] = gradient.compute_s
        epoch = gradient.batch.epoch
        row = epoch % LOSS_EPOCHS
        if self._loss_epochs[row, 0] != epoch:
            self._loss_epochs[row, 0] = epoch
            self._loss_epochs[row, 1] = 0
            self._losses[row] = 0.0
        examples = gradient.examples
        self._losses[row] += gradient.loss * examples
        self._loss_epochs[row, 1] += examples

    def stepped(self, members: Sequence[StepMember], updates: int, now: float) -> None:
        """Count the gradients of a step.

        Args:
            members: gradients that are in a step for the first time.
            updates: number of updates after the step.
            now: time of the server's clock, seconds.
        """
        counts = self._counts
        for updates_read, examples in members:
            staleness = updates - 1 - updates_read
            if staleness < MAX_STALENESS:
                self._staleness[staleness] += 1
            else:
                self._rare_staleness[staleness] += 1
            counts[SAMPLES] += examples
            counts[COUNTED] += examples
        self._outcomes[APPLIED] += len(members)
        self._times[STEPPED_AT] = now
        if self.first is None:
            self._times[FIRST_AT] = now
            counts[FIRST_UPDATES] = updates
            counts[FIRST_SAMPLES] = counts[SAMPLES]

    def pushes(self) -> dict[Outcome, int]:
        """Return outcome -> number of pushes."""
        return dict(zip(OUTCOMES, self.outcomes.tolist(), strict=True))

    def staleness_counts(self) -> dict[int, int]:
        """Return staleness -> number of applied gradients, for each staleness that occurred."""
        occurred = np.flatnonzero(self.staleness)
        counts = dict(zip(occurred.tolist(), self.staleness[occurred].tolist(), strict=True))
        return counts | dict(self._rare_staleness)

    @property
    def bytes(self) -> int:
        """Bytes of the vectors of all pushes."""
        return self._counts[BYTES]

    @property
    def longest_s(self) -> float:
        """Longest computing time of a batch in this process, seconds."""
        return float(self._times[LONGEST_S])

    @property
    def first(self) -> Mark | None:
        """Progress at the first step of this process; None before."""
        return self._mark(FIRST_AT, self._counts[FIRST_UPDATES], self._counts[FIRST_SAMPLES])

    def last(self, updates: int) -> Mark | None:
        """Return the progress at the newest step of this process, after which there were `updates`; None before."""
        return self._mark(STEPPED_AT, updates, self._counts[SAMPLES])

    def _mark(self, time: int, updates: int, samples: int) -> Mark | None:
        now = self._times[time]
        return None if isnan(now) else Mark(now, updates, samples)

    def epoch_losses(self) -> dict[int, EpochLoss]:
        """Return epoch -> loss, for the newest epochs, in order."""
        rows = zip(self.loss_epochs.tolist(), self.losses.tolist(), strict=True)
        return dict(sorted((epoch, EpochLoss(loss, examples)) for (epoch, examples), loss in rows if epoch != NO_EPOCH))

    def rejected(self) -> dict[BatchId, int]:
        """Return batch -> number of its gradients that were not finite."""
        return dict(self._rejected)

    def forget(self, epochs: int) -> None:
        """Drop the counts of batches in the first `epochs` epochs, which are complete."""
        self._rejected = Counter({batch: n for batch, n in self._rejected.items() if batch.epoch >= epochs})

    def state(self) -> dict[str, Any]:
        """Return the saved counters as JSON values by name."""
        return {
            "samples": self.samples,
            "counted": self.counted,
            "bytes": self.bytes,
            "pushes": {outcome.value: count for outcome, count in self.pushes().items()},
            "staleness": sorted(self.staleness_counts().items()),
            "losses": [[epoch, *loss] for epoch, loss in self.epoch_losses().items()],
        }

    def load(self, metadata: Mapping[str, Any]) -> None:
        """Restore the counters from what `state()` returned; other names in `metadata` are ignored."""
        self._counts[SAMPLES] = metadata["samples"]
        self._counts[COUNTED] = metadata["counted"]
        self._counts[BYTES] = metadata["bytes"]
        for name, count in metadata["pushes"].items():
            self._outcomes[CODES[Outcome(name)]] = count
        for value, count in metadata["staleness"]:
            if value < MAX_STALENESS:
                self._staleness[value] = count
            else:
                self._rare_staleness[value] = count
        for epoch, total, examples in metadata["losses"]:
            row = epoch % LOSS_EPOCHS
            self._losses[row] = nan if total is None else total
            self._loss_epochs[row, 0] = epoch
            self._loss_epochs[row, 1] = examples
