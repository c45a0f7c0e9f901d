"""Tally: the counters of a server, over its pushes and steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import nan
from typing import Any

from psgd.core.server.aggregators import StepMember
from psgd.core.server.report import EpochLoss, Mark
from psgd_workers.messages import BatchId, Gradient, Outcome

__all__ = ["Tally"]

APPLIED = Outcome.APPLIED  # bound once: in Python 3.11, access through the enum takes 80 ns
LOSS_EPOCHS = 2  # epochs whose loss is kept: the open one and the newest complete one
JITTER_S = 0.01  # seconds by which a push may be slower to arrive than the worker's push before it


class Tally:
    """Counters of one partition. Most are saved with its state; the times are those of this process only.

    Attributes:
        pushes: outcome -> number of pushes: refused ones at once, applied ones once they are in a step.
        staleness: staleness -> number of applied gradients.
        samples: number of examples applied.
        bytes: bytes of the vectors of all pushes.
        longest_s: longest computing time of a batch in this process, seconds.
        first: progress at the first step of this process.
        stepped_at: time of the newest step of this process, seconds.
        worker_pushes: worker with a lease -> number of its pushes since it joined, of any outcome.
    """

    def __init__(self) -> None:
        self.pushes = Counter[Outcome]()
        self.staleness = Counter[int]()
        self.samples = 0
        self.bytes = 0
        self.longest_s = 0.0
        self.first: Mark | None = None
        self.stepped_at: float | None = None
        self._losses: dict[int, list[Any]] = {}  # epoch -> [total, examples] of its EpochLoss
        self._rejected = Counter[BatchId]()
        self.worker_pushes: dict[str, int] = {}
        self._last_push_at: dict[str, float] = {}  # worker with a lease -> time of its last push, or of its join

    def joined(self, worker: str, now: float) -> None:
        """Start to count the pushes of a worker that got a lease, and to measure the time between them."""
        self._last_push_at.setdefault(worker, now)
        self.worker_pushes.setdefault(worker, 0)

    def left(self, worker: str) -> None:
        """Forget a worker that has no lease any more."""
        self._last_push_at.pop(worker, None)
        self.worker_pushes.pop(worker, None)

    def arrived(self, gradient: Gradient, now: float) -> Gradient:
        """Count a push and its bytes, and limit the computing time that its worker reported.

        A worker computes one batch at a time, so a batch took at most the time since the last push of its worker. For
        a worker that has no lease, that time is unknown, and the limit is next to 0.

        Returns:
            The gradient, with `compute_s` limited to what the server's own clock allows.
        """
        self.bytes += gradient.nbytes
        worker = gradient.worker
        last_push_at = self._last_push_at.get(worker)
        if last_push_at is None:
            allowed_s = JITTER_S
        else:
            allowed_s = now - last_push_at + JITTER_S
            self._last_push_at[worker] = now
            self.worker_pushes[worker] += 1
        return gradient if gradient.compute_s <= allowed_s else gradient._replace(compute_s=allowed_s)

    def refused(self, gradient: Gradient, outcome: Outcome) -> None:
        """Count a push that did not enter a round."""
        self.pushes[outcome] += 1
        if outcome is Outcome.REJECTED:
            self._rejected[gradient.batch] += 1

    def collected(self, gradient: Gradient) -> None:
        """Count the loss and the computing time of a gradient that entered a round."""
        if gradient.compute_s > self.longest_s:
            self.longest_s = gradient.compute_s
        epoch = gradient.batch.epoch
        loss = self._losses.get(epoch)
        if loss is None:
            loss = self._losses[epoch] = [0.0, 0]
            for old in sorted(self._losses)[:-LOSS_EPOCHS]:
                del self._losses[old]
        examples = gradient.examples
        loss[0] += gradient.loss * examples
        loss[1] += examples

    def stepped(self, members: Sequence[StepMember], updates: int, now: float) -> int:
        """Count the gradients of a step.

        Args:
            members: gradients that are in a step for the first time.
            updates: number of updates after the step.
            now: time of the server's clock, seconds.

        Returns:
            Number of examples in these gradients.
        """
        examples = 0
        for updates_read, count in members:
            self.staleness[updates - 1 - updates_read] += 1
            examples += count
        self.samples += examples
        self.pushes[APPLIED] += len(members)
        self.stepped_at = now
        if self.first is None:
            self.first = Mark(now, updates, self.samples)
        return examples

    def losses(self) -> dict[int, EpochLoss]:
        """Return epoch -> loss, for the newest epochs."""
        return {epoch: EpochLoss(*loss) for epoch, loss in self._losses.items()}

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
            "bytes": self.bytes,
            "pushes": {outcome.value: count for outcome, count in self.pushes.items()},
            "staleness": sorted(self.staleness.items()),
            "losses": [[epoch, *loss] for epoch, loss in sorted(self._losses.items())],
        }

    def load(self, metadata: Mapping[str, Any]) -> None:
        """Restore the counters from what `state()` returned; other names in `metadata` are ignored."""
        self.samples = metadata["samples"]
        self.bytes = metadata["bytes"]
        self.pushes.update({Outcome(name): count for name, count in metadata["pushes"].items()})
        self.staleness.update({int(value): count for value, count in metadata["staleness"]})
        self._losses = {
            epoch: [nan if total is None else total, examples] for epoch, total, examples in metadata["losses"]
        }
