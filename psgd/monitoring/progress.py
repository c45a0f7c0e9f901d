"""The progress display on stderr: a line for each epoch, and on a terminal a live line below them.

    epoch  2/30  loss 0.2113  val loss 0.1980  val acc 0.9444  1204 updates/s  workers 2/2
    epoch  3/30 ━━━━━━━━━━━━━━━━━━━━  loss 0.1532  0:24 left  1204 updates/s  workers 2/2

The line of an epoch is printed after its validation, so that its losses and its accuracy belong to that epoch. The live
line shows the training loss of the epoch that is being trained. Numbers that do not fit the terminal are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.text import Text

from psgd.core.driver.status import EpochStatus, RunStatus
from psgd.core.server.report import staleness_summary
from psgd.monitoring.pace import Pace
from psgd.monitoring.stages import is_live
from psgd.spec import JobSpec

__all__ = ["Display"]

GAP = "  "
BAR = 20  # length of the bar, in cells of the terminal
LEAST_BAR = 8  # cells; a shorter bar is left out
NO_LOSS = ["loss -     "]  # before the first loss of an epoch: as wide as a loss, so that the line does not jump
MAX_NAMED_PROCESSES = 3  # largest number of processes that the live line names as waited for
STUCK_S = 2.0  # seconds of waiting after which the live line names the processes that the run waits for


class Display:
    """Shows the progress of a run.

    Args:
        spec: the job.
        console: console to print to. It gets a live line only if it is a terminal that can move its cursor, whatever
            FORCE_COLOR says.
    """

    def __init__(self, spec: JobSpec, console: Console) -> None:
        self._epochs = spec.run.epochs
        self._pace = Pace(spec.run)
        self._console = console
        self._live = Live(console=console, transient=True, auto_refresh=False) if is_live(console) else None
        self._printed = 0  # newest epoch whose line was printed
        # (processes and steps that the run waits for, time at which this began, in seconds)
        self._waiting: tuple[tuple[str, ...], float] = ((), 0.0)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def show(self, status: RunStatus) -> None:
        """Print the lines of epochs that are complete and validated, and update the live line."""
        self._pace.see(status)
        for epoch in status.recent_epochs:
            if epoch.validating:
                break
            self._print_line(epoch, status)
        if self._live:
            self._live.update(self._live_line(status), refresh=True)

    def finish(self, status: RunStatus) -> None:
        """Print the remaining lines, with or without validation."""
        for epoch in status.recent_epochs:
            self._print_line(epoch, status)

    def _print_line(self, epoch: EpochStatus, status: RunStatus) -> None:
        if epoch.epoch <= self._printed:  # true also for an epoch that is repeated after a server was restored
            return
        self._printed = epoch.epoch
        needed = _number("loss", epoch.loss)
        if epoch.validation:
            needed += _number("val loss", epoch.validation.loss) + _number("val acc", epoch.validation.accuracy)
        extras = _extras(status) if self._live else [*self._left(), *_extras(status)]
        width = self._console.width if self._live else None
        line = _join_fitting([self._title(epoch.epoch), *needed], extras, width)
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _live_line(self, status: RunStatus) -> Text:
        """Return the live line: the title, the bar, the needed numbers, and the other numbers that fit."""
        width = self._console.width - 1  # a full line makes some terminals wrap
        title, needed, extras, share = self._live_parts(status)
        room = width - cell_len(GAP.join([title, *needed])) - 1
        bar = min(BAR, room) if share is not None and room >= LEAST_BAR else 0
        numbers = _join_fitting(needed, extras, width - cell_len(title) - 1 - bar - len(GAP))
        line = Text.assemble(f"{title} ", *self._bar(share or 0.0, bar))
        line.append(f"{GAP if bar else ' '}{numbers}", style="cyan")
        line.truncate(width, overflow="ellipsis")
        return line

    def _bar(self, share: float, cells: int) -> tuple[tuple[str, str], tuple[str, str]]:
        """Return the done and the remaining part of the bar, with styles. Without colours the remainder is blank."""
        done = round(cells * share)
        dash = "━" if self._console.encoding.startswith("utf") else "-"
        coloured = self._console.color_system is not None and not self._console.no_color
        return (dash * done, "bar.complete"), ((dash if coloured else " ") * (cells - done), "bar.back")

    def _live_parts(self, status: RunStatus) -> tuple[str, list[str], list[str], float | None]:
        """Return the title, the needed numbers, the numbers shown if there is room, and the share of the run done."""
        clock = [f"{_duration(status.elapsed_s)} so far"] if status.began is not None else []
        if status.phase != "training":
            return status.phase, _waiting(status), clock, None
        epoch = status.epochs + 1 if self._epochs is None else min(status.epochs + 1, self._epochs)
        loss = _number("loss", status.loss) if status.loss_epoch == epoch else NO_LOSS
        needed = [*loss, *(_waiting(status) if self._is_stuck(status) else self._left())]
        return self._title(epoch), needed, _extras(status) + clock, self._pace.share(status)

    def _left(self) -> list[str]:
        left_s = self._pace.left_s()
        return [] if left_s is None else [f"{_duration(left_s)} left"]

    def _is_stuck(self, status: RunStatus) -> bool:
        if self._waiting[0] != status.waiting_for:
            self._waiting = (status.waiting_for, status.now)
        return bool(status.waiting_for) and status.now - self._waiting[1] >= STUCK_S

    def _title(self, epoch: int) -> str:
        return f"epoch {epoch}" if self._epochs is None else f"epoch {epoch:{len(str(self._epochs))}}/{self._epochs}"


def _extras(status: RunStatus) -> list[str]:
    """Return numbers about the whole run, the most interesting first."""
    extras = [] if status.updates_per_s is None else [f"{status.updates_per_s:.0f} updates/s"]
    extras.append(f"workers {status.workers_up}/{status.target_workers}")
    staleness = staleness_summary(status.staleness)
    if staleness["p50"] is not None:
        extras.append(f"staleness {staleness['p50']:.0f} (p95 {staleness['p95']:.0f})")
    return extras


def _number(name: str, value: float | None) -> list[str]:
    return [] if value is None else [f"{name} {value:.4f}"]


def _waiting(status: RunStatus) -> list[str]:
    if not status.waiting_for:
        return []
    more = len(status.waiting_for) - MAX_NAMED_PROCESSES
    named = ", ".join(status.waiting_for[:MAX_NAMED_PROCESSES]) + (f" and {more} more" if more > 0 else "")
    return [f"waiting for {named}"]


def _join_fitting(needed: Sequence[str], extras: Sequence[str], width: int | None) -> str:
    """Join the needed numbers and, in order, the extras that fit the width, in cells. A width of None fits all."""
    parts = [*needed]
    for extra in extras:
        if width is not None and cell_len(GAP.join([*parts, extra])) > width:
            break
        parts.append(extra)
    return GAP.join(parts)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
