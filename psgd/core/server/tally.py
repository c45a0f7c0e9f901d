"""The tally: what a server counts of the pushes it takes and the steps it makes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import nan
from typing import Any

from psgd.core.server.aggregators import StepMember
from psgd.core.server.report import EpochLoss, Mark
from psgd_workers.messages import BatchId, Gradient, Outcome

__all__ = ["Tally"]

LOSS_EPOCHS = 2  # the open one and the newest complete one
JITTER_S = 0.01  # a push may take so much longer to arrive than the one before it


class Tally:
    """One partition's.

    Attributes:
        pushes: by what became of them at once, and of those in a step.
        staleness: how many applied gradients were how stale.
        samples: examples applied.
        bytes: of the vectors of all pushes.
        longest_s: that a batch has taken to compute, in this process.
        first: this process's first step.
        stepped_at: its newest one.
    """

    def __init__(self) -> None:
        self.pushes = Counter[Outcome]()
        self.staleness = Counter[int]()
        self.samples = 0
        self.bytes = 0
        self.longest_s = 0.0
        self.first: Mark | None = None
        self.stepped_at: float | None = None
        self._losses: dict[int, list[Any]] = {}  # epoch -> what an EpochLoss is made of, added up in place
        self._rejected = Counter[BatchId]()
        self._heard_at: dict[str, float] = {}  # when each worker with a lease joined or pushed last

    def joined(self, worker: str, now: float) -> None:
        """Note a worker that got a lease."""
        self._heard_at.setdefault(worker, now)

    def left(self, worker: str) -> None:
        """Forget a worker that has no lease any more."""
        self._heard_at.pop(worker, None)

    def arrived(self, gradient: Gradient, now: float) -> Gradient:
        """Count a push and bound the time that its worker says it took.

        A worker computes one batch at a time, so none took longer than the time since the server heard from it last.
        Of a worker that never joined, or has left, nothing is known.

        Returns:
            The gradient, with what the server's own clock allows.
        """
        self.bytes += gradient.nbytes
        worker = gradient.worker
        heard_at = self._heard_at.get(worker)
        if heard_at is None:
            allowed_s = JITTER_S
        else:
            allowed_s = now - heard_at + JITTER_S
            self._heard_at[worker] = now
        return gradient if gradient.compute_s <= allowed_s else gradient._replace(compute_s=allowed_s)

    def refused(self, gradient: Gradient, outcome: Outcome) -> None:
        """A gradient is in no round."""
        self.pushes[outcome] += 1
        if outcome is Outcome.REJECTED:
            self._rejected[gradient.batch] += 1

    def collected(self, gradient: Gradient) -> None:
        """A gradient is in a round."""
        self.longest_s = max(self.longest_s, gradient.compute_s)
        epoch = gradient.batch.epoch
        loss = self._losses.get(epoch)
        if loss is None:
            loss = self._losses[epoch] = [0.0, 0]
            for old in sorted(self._losses)[:-LOSS_EPOCHS]:
                del self._losses[old]
        loss[0] += gradient.loss * gradient.examples
        loss[1] += gradient.examples

    def stepped(self, members: Sequence[StepMember], updates: int, now: float) -> int:
        """A round became a step, the server's newest; returns the examples in it."""
        examples = 0
        for read, count in members:
            self.staleness[updates - 1 - read] += 1
            examples += count
        self.samples += examples
        self.pushes[Outcome.APPLIED] += len(members)
        self.stepped_at = now
        if self.first is None:
            self.first = Mark(now, updates, self.samples)
        return examples

    def losses(self) -> dict[int, EpochLoss]:
        """Of the newest epochs."""
        return {epoch: EpochLoss(*loss) for epoch, loss in self._losses.items()}

    def rejected(self) -> dict[BatchId, int]:
        """Return how often a batch's gradient was not finite, by batch."""
        return dict(self._rejected)

    def forget(self, epochs: int) -> None:
        """Drop the counts of batches of epochs before `epochs`, which are complete."""
        self._rejected = Counter({batch: n for batch, n in self._rejected.items() if batch.epoch >= epochs})

    def state(self) -> dict[str, Any]:
        """What `load` needs, in plain JSON values."""
        return {
            "samples": self.samples,
            "bytes": self.bytes,
            "pushes": {outcome.value: count for outcome, count in self.pushes.items()},
            "staleness": sorted(self.staleness.items()),
            "losses": [[epoch, *loss] for epoch, loss in sorted(self._losses.items())],
        }

    def load(self, metadata: Mapping[str, Any]) -> None:
        """Count on from there."""
        self.samples = metadata["samples"]
        self.bytes = metadata["bytes"]
        self.pushes.update({Outcome(name): count for name, count in metadata["pushes"].items()})
        self.staleness.update({int(value): count for value, count in metadata["staleness"]})
        self._losses = {
            epoch: [nan if total is None else total, examples] for epoch, total, examples in metadata["losses"]
        }
