"""The observer: what is told while a run goes on, to people and to `metrics.jsonl`."""

from __future__ import annotations

from collections.abc import Callable

from psgd.core.driver.checkpoint_schedule import CheckpointSchedule
from psgd.core.driver.coordinator import Coordinator
from psgd.monitoring.metrics import run_metrics
from psgd.monitoring.progress import Display
from psgd.store.run_directory import RunDirectory

__all__ = ["Observer"]

METRICS_S = 1.0  # between two lines of metrics.jsonl


class Observer:
    """Writes metrics, moves the display and warns of checkpoints that cannot be written.

    Args:
        run: where metrics go.
        display: of the run.
        caution: tells people.
        now: seconds.
    """

    def __init__(self, run: RunDirectory, display: Display, caution: Callable[[str], None], now: float) -> None:
        self._run = run
        self._display = display
        self._caution = caution
        self._written_at = now
        self._unsaved = False  # whether it was told that the newest checkpoint could not be written

    def __call__(self, coordinator: Coordinator, now: float) -> None:
        self._display.show(coordinator, now)
        self._watch_saving(coordinator.checkpoint_schedule)
        if now - self._written_at >= METRICS_S and coordinator.reports:
            self._written_at = now
            self.write(coordinator)

    def _watch_saving(self, checkpoint_schedule: CheckpointSchedule) -> None:
        """Tell once that checkpoints cannot be written, until one can."""
        goes_on = not checkpoint_schedule.last or checkpoint_schedule.retry_at < float("inf")  # else the result tells
        if checkpoint_schedule.fault and goes_on and not self._unsaved:
            further = "It is tried again" if checkpoint_schedule.last else "Training goes on"
            self._caution(
                f"a checkpoint could not be written: {checkpoint_schedule.fault}. {further}; {checkpoint_schedule.told}"
            )
        self._unsaved = checkpoint_schedule.fault is not None

    def write(self, coordinator: Coordinator) -> None:
        """One line of metrics."""
        position = {
            "epochs": coordinator.epochs,
            "updates": coordinator.updates,
            "workers": len(coordinator.worker_table.up),
        }
        self._run.metrics(position | run_metrics(coordinator))
