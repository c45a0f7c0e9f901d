"""The progress display: one live bar on a terminal, a line per epoch elsewhere; always on stderr."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from psgd.core.driver.coordinator import Coordinator
from psgd.monitoring.metrics import run_metrics
from psgd.spec import JobSpec

__all__ = ["Display"]

REFRESH_S = 0.2


class _Numbers(ProgressColumn):
    """The newest numbers, those not measured yet left out."""

    def render(self, task: Task) -> Text:
        return Text(str(task.fields["numbers"]), style="cyan")


class Display:
    """Shows a run's progress.

    Args:
        spec: the job.
        num_batches: of an epoch.
        console: where to.
    """

    def __init__(self, spec: JobSpec, num_batches: int, console: Console) -> None:
        self._epochs = spec.run.epochs
        self._workers = spec.scaling.most_workers
        self._num_batches = num_batches
        self._console = console
        columns = (TextColumn("{task.description}"), BarColumn(20), _Numbers(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, transient=True)
        self._task = self._progress.add_task("starting", total=num_batches, numbers="")
        self._shown_at = float("-inf")
        self._told = 0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def show(self, coordinator: Coordinator, now: float) -> None:
        """Bring the display up to date: the bar at most every `REFRESH_S`, a line whenever an epoch is done."""
        if coordinator.phase == "starting":
            return
        if not self._console.is_terminal:
            self._tell(coordinator)
        elif now - self._shown_at >= REFRESH_S:
            self._shown_at = now
            self._move(coordinator)

    def _tell(self, coordinator: Coordinator) -> None:
        epochs = coordinator.epochs
        if epochs > self._told:  # less after a server was restored: what is done again was told
            self._told = epochs
            line = f"{self._title(epochs)} done  {self._numbers(coordinator)}"
            self._console.print(line, highlight=False, soft_wrap=True)

    def _move(self, coordinator: Coordinator) -> None:
        epochs = coordinator.epochs
        current = epochs + 1 if self._epochs is None else min(epochs + 1, self._epochs)
        done = coordinator.ledger.done if coordinator.phase == "training" else self._num_batches
        numbers = self._numbers(coordinator)
        self._progress.update(self._task, description=self._title(current), completed=done, numbers=numbers)

    def _title(self, epoch: int) -> str:
        return f"epoch {epoch}" + (f"/{self._epochs}" if self._epochs else "")

    def _numbers(self, coordinator: Coordinator) -> str:
        metrics = run_metrics(coordinator)
        shown = [
            ("loss", metrics["train/loss"], "{:.4f}"),
            ("val acc", metrics["val/accuracy"], "{:.4f}"),
            ("updates/s", metrics["perf/updates_per_s"], "{:.0f}"),
            ("staleness p50", metrics["async/staleness_p50"], "{:.0f}"),
            ("p95", metrics["async/staleness_p95"], "{:.0f}"),
        ]
        parts = [f"{name} {form.format(value)}" for name, value, form in shown if value is not None]
        return "  ".join([*parts, f"workers {len(coordinator.worker_table.up)}/{self._workers}"])
