"""When a run has gone far enough."""

from __future__ import annotations

from collections.abc import Iterable

from psgd.core.server.report import Report
from psgd.spec import RunConfig
from psgd_workers.messages import Evaluation

__all__ = ["Limits"]


class Limits:
    """The limits of a job's `run`; the first that is reached ends it.

    Args:
        run: the limits.
    """

    def __init__(self, run: RunConfig) -> None:
        self._run = run

    def reached(self, epochs: int, updates: int) -> bool:
        """Whether enough of the data, or enough steps, are in the weights."""
        run = self._run
        return (run.epochs is not None and epochs >= run.epochs) or (
            run.max_updates is not None and updates >= run.max_updates
        )

    def updates_left(self, updates: int) -> int | None:
        """Steps that `max_updates` still allows; None: any number."""
        return None if self._run.max_updates is None else max(0, self._run.max_updates - updates)

    def deadline(self, began: float | None) -> float:
        """When the time is up."""
        return float("inf") if began is None or self._run.max_time_s is None else began + self._run.max_time_s

    def target_reached(self, epochs: int, reports: Iterable[Report], evaluations: Iterable[Evaluation]) -> bool:
        """Whether a complete epoch's metric is as good as the target."""
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
