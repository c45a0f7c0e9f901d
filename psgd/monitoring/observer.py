"""The observer: what people and `metrics.jsonl` are told while a run goes on, read from one status at a time."""

from __future__ import annotations

from collections.abc import Callable

from psgd.core.driver.status import CheckpointStatus, RunStatus
from psgd.monitoring.metrics import metrics_row
from psgd.monitoring.progress import Display
from psgd.store.run_directory import RunDirectory

__all__ = ["Observer"]

LOOK_S = 0.2  # between two looks at the status: making one costs time that grows with the workers
METRICS_S = 1.0  # between two lines of metrics.jsonl


class Observer:
    """Writes metrics, moves the display and warns of checkpoints that cannot be written.

    Args:
        run: directory that metrics are written to.
        display: progress display of the run.
        caution: prints a warning.
        now: seconds.
    """

    def __init__(self, run: RunDirectory, display: Display, caution: Callable[[str], None], now: float) -> None:
        self._run = run
        self._display = display
        self._caution = caution
        self._looked_at = float("-inf")
        self._written_at = now
        self._warned = False  # True until a checkpoint can be written again

    def __call__(self, status: Callable[[float], RunStatus], now: float) -> None:
        """Look at the run, unless the last look was a moment ago.

        Args:
            status: makes the status of a time.
            now: seconds.
        """
        if now - self._looked_at < LOOK_S:
            return
        self._looked_at = now
        self._look(status(now))

    def _look(self, status: RunStatus) -> None:
        self._display.show(status)
        self._watch_saving(status.checkpoint)
        if status.now - self._written_at >= METRICS_S and status.phase != "starting":
            self._written_at = status.now
            self._run.metrics(metrics_row(status))

    def finish(self, status: RunStatus) -> None:
        """Show and write the end of the run; a run that another driver took over is not written to."""
        self._display.finish(status)
        if self._run.is_ours:
            self._run.metrics(metrics_row(status))

    def _watch_saving(self, checkpoint: CheckpointStatus) -> None:
        """Tell once that checkpoints cannot be written, until one can."""
        goes_on = not checkpoint.last or checkpoint.retries  # else the result tells
        if checkpoint.fault and goes_on and not self._warned:
            further = "It is tried again" if checkpoint.last else "Training goes on"
            self._caution(f"a checkpoint could not be written: {checkpoint.fault}. {further}; {checkpoint.text}")
        self._warned = checkpoint.fault is not None
