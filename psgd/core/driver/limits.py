"""The limits at which a run ends: epochs, updates, time, or a target for a metric."""

from __future__ import annotations

from collections.abc import Iterable

from psgd.core.server.report import Report
from psgd.spec import RunConfig
from psgd_workers.messages import Evaluation

__all__ = ["Limits"]


class Limits:
    """The limits of a job's `run`; the first that is reached ends it.

    Args:
        run: the job's `run` section.
    """

    def __init__(self, run: RunConfig) -> None:
        self._run = run

    def reached(self, epochs: int, updates: int) -> bool:
        """Return True if the run has completed `run.epochs` epochs or made `run.max_updates` updates."""
        run = self._run
        return (run.epochs is not None and epochs >= run.epochs) or (
            run.max_updates is not None and updates >= run.max_updates
        )

    def validates(self, epochs: int) -> bool:
        """Return True if the weights after `epochs` complete epochs are validated while training goes on."""
        every = self._run.validate_every
        return every > 0 and epochs % every == 0

    def updates_left(self, updates: int) -> int | None:
        """Return the number of updates that `run.max_updates` still allows; None if it is not set."""
        return None if self._run.max_updates is None else max(0, self._run.max_updates - updates)

    def deadline(self, began: float | None) -> float:
        """Return the time at which `run.max_time_s` is over; infinity if it never is.

        Args:
            began: time at which training began, in seconds; None before.
        """
        return float("inf") if began is None or self._run.max_time_s is None else began + self._run.max_time_s

    def target_reached(self, epochs: int, reports: Iterable[Report], evaluations: Iterable[Evaluation]) -> bool:
        """Return True if the metric of a complete epoch has reached `run.target`.

        Args:
            epochs: number of complete epochs.
            reports: newest report of each partition.
            evaluations: every evaluation so far.
        """
        target = self._run.target
        if target is None:
            return False
        if target.metric == "train/loss":
            losses = [report.losses.get(epochs - 1) for report in reports]
            values = [None if loss is None else loss.mean for loss in losses]
        else:
            accuracy = target.metric == "val/accuracy"
            values = [evaluation.accuracy if accuracy else evaluation.loss for evaluation in evaluations]
        return any(value is not None and target.reached(value) for value in values)
