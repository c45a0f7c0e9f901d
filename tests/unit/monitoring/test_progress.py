from __future__ import annotations

from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from psgd.core.driver.status import RunStatus
from psgd.monitoring.progress import STUCK_S, Display
from psgd.simulation.cluster import VirtualCluster
from psgd.simulation.observer import ClusterObserver
from psgd_workers.messages import Evaluation
from tests.support.in_process import InProcess
from tests.support.jobs import GRID, START, job, quadratic
from tests.support.statuses import epoch, status


class Terminal(StringIO):
    """A file that looks like a terminal."""

    def isatty(self) -> bool:
        return True


def told(shown: list[RunStatus], epochs: int | None = 3, console: Console | None = None, **options: Any) -> list[str]:
    """Return the output while these statuses are shown, the last one at the end of the run."""
    console = console or Console(file=StringIO(), width=200, **options)
    limit = {"epochs": epochs} if epochs else {"epochs": None, "max_time_s": 1.0}
    with Display(job(run=limit), console) as display:
        for one in shown:
            display.show(one)
        display.finish(shown[-1])
    assert isinstance(console.file, StringIO)
    return console.file.getvalue().splitlines()


def live_line(shown: list[RunStatus], width: int, epochs: int | None = 30) -> str:
    """Return the live line after these statuses, on a terminal of that width."""
    console = Console(file=Terminal(), width=width, color_system=None, force_terminal=True, _environ={"TERM": "xterm"})
    limit = {"epochs": epochs} if epochs else {"epochs": None, "max_time_s": 1.0}
    with Display(job(run=limit), console) as display:
        for one in shown:
            display.show(one)
        assert isinstance(console.file, Terminal)
        text = console.file.getvalue()
    return text.rpartition("\r")[2].rpartition("\x1b[2K")[2].removeprefix("\x1b[?25l").strip("\n")


def busy(now: float, done: int, **fields: Any) -> RunStatus:
    """Return the status of a run in the middle of its third epoch, with every metric measured."""
    return status(
        [epoch(1, 0.4, 0.9), epoch(2, 0.2, 0.95)],
        now=now,
        batches=done,
        updates_per_s=1204.0,
        loss=0.1532,
        loss_epoch=3,
        staleness={1: 90, 3: 10},
        validation=Evaluation(0.05, 0.95, 100),
        validation_epoch=2,
        **fields,
    )


def test_every_epoch_has_a_line_however_fast() -> None:
    shown = [status(phase="starting"), status([epoch(1)]), status([epoch(1), epoch(2), epoch(3)])]
    assert told(shown) == [f"epoch {n}/3  workers 1/1" for n in (1, 2, 3)]


def test_without_a_last_epoch_none_is_named() -> None:
    assert told([status([epoch(1)])], epochs=None) == ["epoch 1  workers 1/1"]


def test_an_epochs_line_waits_for_its_own_validation() -> None:
    one = epoch(1, 0.5, 0.8)
    shown = [
        status([epoch(1, 0.5, validating=True)]),
        status([epoch(1, 0.5, validating=True), epoch(2, 0.4, 0.9)]),  # a second worker was faster
        status([one, epoch(2, 0.4, 0.9), epoch(3, 0.3, validating=True)]),
    ]
    assert told(shown[:1]) == ["epoch 1/3  loss 0.5000  workers 1/1"]  # the run ended without it
    assert told(shown) == [
        "epoch 1/3  loss 0.5000  val loss 0.2000  val acc 0.8000  workers 1/1",
        "epoch 2/3  loss 0.4000  val loss 0.1000  val acc 0.9000  workers 1/1",
        "epoch 3/3  loss 0.3000  workers 1/1",
    ]


def test_an_epoch_done_again_after_a_restored_server_is_told_once() -> None:
    shown = [status([epoch(1), epoch(2)]), status([epoch(1)]), status([epoch(n) for n in (1, 2, 3)])]
    assert [line[:7] for line in told(shown)] == ["epoch 1", "epoch 2", "epoch 3"]


def test_a_resumed_run_tells_only_its_own_epochs() -> None:
    assert told([status(epochs=5), status([epoch(6)])], epochs=9) == ["epoch 6/9  workers 1/1"]


def test_a_quiet_console_prints_nothing() -> None:
    assert told([status([epoch(1)])], quiet=True) == []
    quiet = Console(file=Terminal(), quiet=True, force_terminal=True, _environ={"TERM": "xterm"})
    assert told([status([epoch(1)])], console=quiet) == []


@pytest.mark.parametrize(
    ("file", "environ"),
    [(StringIO, {"FORCE_COLOR": "1", "TERM": "xterm"}), (Terminal, {"TERM": "dumb"}), (Terminal, {"TERM": "unknown"})],
)
def test_what_cannot_move_its_cursor_gets_lines_without_control_codes(
    file: type[StringIO], environ: dict[str, str]
) -> None:
    console = Console(file=file(), width=200, _environ=environ)
    assert told([status(phase="starting"), status([epoch(1)])], console=console) == ["epoch 1/3  workers 1/1"]


def test_a_terminal_keeps_the_epochs_lines_above_the_live_one() -> None:
    console = Console(file=Terminal(), width=80, color_system=None, _environ={"TERM": "xterm"})
    text = "\n".join(told([busy(0.0, 5)], console=console))
    assert "\x1b[?25l" in text  # a live line hides the cursor
    assert text.index("epoch 1/3  loss 0.4000") < text.index("epoch 2/3  loss 0.2000") < text.index("epoch 3/3 ")


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (50, "epoch  3/30 ━              loss 0.1532  1:48 left"),
        (80, "epoch  3/30 ━━                    loss 0.1532  1:48 left  1204 updates/s"),
        (
            120,
            "epoch  3/30 ━━                    loss 0.1532  1:48 left  1204 updates/s  workers 1/1  staleness 1 (p95 3)"
            "  0:04 so far",
        ),
    ],
)
def test_the_live_line_fits_its_terminal_and_tells_the_time_left(width: int, line: str) -> None:
    found = live_line([busy(0.0, 0), busy(4.0, 10)], width)
    assert found == line
    assert len(found) < width


def test_the_live_line_shows_no_earlier_epochs_loss_as_the_open_ones() -> None:
    found = live_line([replace(busy(0.0, 0), loss_epoch=2)], 80)
    assert found.startswith("epoch  3/30")
    assert "loss -     " in found


def test_a_narrow_terminal_cuts_the_live_line_and_does_not_wrap_it() -> None:
    found = live_line([busy(0.0, 0), busy(4.0, 10)], 24)
    assert len(found) < 24
    assert found.startswith("epoch  3/30")


def test_the_live_line_says_what_a_run_that_starts_or_stands_still_waits_for() -> None:
    waiting = ("server 0", "worker-0", "worker-1", "worker-2", "worker-3")
    named = "waiting for server 0, worker-0, worker-1 and 2 more"
    assert live_line([status(phase="starting", began=None, waiting_for=waiting)], 80) == f"starting  {named}"
    assert "waiting" not in live_line([busy(1.0, 5, waiting_for=("server 0",))], 80)
    stuck = [busy(now, 5, waiting_for=("server 0",)) for now in (1.0, 1.0 + STUCK_S)]
    assert "waiting for server 0" in live_line(stuck, 80)
    ending = live_line([status(phase="ending", now=90.0, waiting_for=("checkpoint",))], 80)
    assert ending == "ending  waiting for checkpoint  1:30 so far"


@pytest.mark.parametrize(("workers", "epochs"), [(1, 4), (3, 4)])
def test_a_whole_run_is_told_epoch_by_epoch_each_with_its_own_validation(workers: int, epochs: int) -> None:
    text = StringIO()
    spec = job(workers=workers, run={"epochs": epochs})
    display = Display(spec, Console(file=text, width=200))

    class Shown(ClusterObserver):
        def acted(self, cluster: VirtualCluster, action: Any) -> None:
            display.show(cluster.status)

    run = InProcess(
        spec,
        GRID,
        START,
        quadratic,
        compute_s=lambda worker, batch: 0.001,  # an epoch is over long before its validation
        evaluate=lambda weights: Evaluation(float(weights.sum()), None, 1),
        observers=[Shown()],
    ).run()
    display.finish(run.status)
    lines = [line.split("  ") for line in text.getvalue().splitlines()]
    assert [parts[0] for parts in lines] == [f"epoch {n}/{epochs}" for n in range(1, epochs + 1)]
    shown = [next(part for part in parts if part.startswith("val loss ")) for parts in lines]
    validated = [one.validation for one in run.status.recent_epochs]
    assert shown == [f"val loss {one.loss:.4f}" for one in validated if one]
    assert len(set(shown)) == epochs
