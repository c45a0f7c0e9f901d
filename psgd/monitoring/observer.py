"""The observer of a run: passes its status to the display and to `metrics.jsonl`."""

from __future__ import annotations

from collections.abc import Callable

from psgd.core.driver.status import CheckpointStatus, RunStatus
from psgd.monitoring.metrics import metrics_row
from psgd.monitoring.progress import Display
from psgd.store.run_directory import RunDirectory

__all__ = ["RunObserver"]

LOOK_S = 0.2  # seconds between two statuses: the time to make one grows with the number of workers
METRICS_S = 1.0  # seconds between two rows of metrics.jsonl


class RunObserver:
    """Writes metrics, updates the display and warns of checkpoints that cannot be written.

    Args:
        run: directory of the run, which gets the metrics.
        display: progress display of the run.
        caution: function that prints a warning.
        now: current time, in seconds.
    """

    def __init__(self, run: RunDirectory, display: Display, caution: Callable[[str], None], now: float) -> None:
        self._run = run
        self._display = display
        self._caution = caution
        self._looked_at = float("-inf")
        self._written_at = now
        self._warned = False  # reset when a checkpoint can be written again

    def __call__(self, status: Callable[[float], RunStatus], now: float) -> None:
        """Read and show the status of the run, unless the last call that did so is less than `LOOK_S` ago.

        Args:
            status: function that returns the status of the run at a given time.
            now: current time, in seconds.
        """
        if now - self._looked_at < LOOK_S:
            return
        self._looked_at = now
        self._show(status(now))

    def _show(self, status: RunStatus) -> None:
        self._display.show(status)
        self._warn_of_faults(status.checkpoint)
        if status.now - self._written_at >= METRICS_S and status.phase != "starting":
            self._written_at = status.now
            self._run.metrics(metrics_row(status))

    def finish(self, status: RunStatus) -> None:
        """Show the end of the run, and write it unless another driver has taken the run over."""
        self._display.finish(status)
        if self._run.is_ours:
            self._run.metrics(metrics_row(status))

    def _warn_of_faults(self, checkpoint: CheckpointStatus) -> None:
        """Warn that checkpoints cannot be written: once, until one can be written again."""
        is_final = checkpoint.last and not checkpoint.retries  # then the run's result says it
        if checkpoint.fault and not is_final and not self._warned:
            consequence = "It is tried again" if checkpoint.last else "Training goes on"
            self._caution(f"a checkpoint could not be written: {checkpoint.fault}. {consequence}; {checkpoint.text}")
        self._warned = checkpoint.fault is not None
