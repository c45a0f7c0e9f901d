from __future__ import annotations

from io import StringIO
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from psgd.core.driver.coordinator import Coordinator
from psgd.monitoring.progress import REFRESH_S, Display
from tests.support.in_process import InProcess
from tests.support.jobs import GRID, START, job, quadratic


def training(epochs: int, done: int = 0, phase: str = "training") -> Coordinator:
    """What the display looks at, before anything is measured."""
    worker_table = SimpleNamespace(up=["worker-0"], residual_norm=None)
    state = {
        "epochs": epochs,
        "phase": phase,
        "ledger": SimpleNamespace(done=done),
        "reports": {},
        "worker_table": worker_table,
    }
    return cast(Coordinator, SimpleNamespace(**state, evaluations=SimpleNamespace(results={})))


def lines(shown: list[Coordinator], epochs: int | None = 3, **options: Any) -> list[str]:
    """What is printed where there is no terminal, all within no time."""
    text = StringIO()
    limit = {"epochs": epochs} if epochs else {"epochs": None, "max_time_s": 1.0}
    with Display(job(run=limit), GRID.num_batches, Console(file=text, width=200, **options)) as display:
        for coordinator in shown:
            display.show(coordinator, 0.0)
    return text.getvalue().splitlines()


def test_every_epoch_has_a_line_however_fast() -> None:
    shown = [training(0, phase="starting"), *(training(n // 2) for n in range(7)), training(3, phase="ending")]
    assert lines(shown) == [f"epoch {n}/3 done  workers 1/1" for n in (1, 2, 3)]


def test_without_a_last_epoch_none_is_named() -> None:
    assert lines([training(1)], epochs=None) == ["epoch 1 done  workers 1/1"]


def test_an_epoch_done_again_after_a_restored_server_is_told_once() -> None:
    assert [line[:7] for line in lines([training(n) for n in (1, 2, 1, 2, 3)])] == ["epoch 1", "epoch 2", "epoch 3"]


def test_a_quiet_console_prints_nothing() -> None:
    assert lines([training(1)], quiet=True) == []


@pytest.mark.parametrize(("later", "seen"), [(REFRESH_S / 2, False), (REFRESH_S, True)])
def test_on_a_terminal_a_bar_is_brought_up_to_date_now_and_then(later: float, seen: bool) -> None:
    text = StringIO()
    console = Console(file=text, width=200, force_terminal=True, color_system=None)
    with Display(job(run={"epochs": 3}), GRID.num_batches, console) as display:
        display.show(training(0), 0.0)
        display.show(training(1), later)
    assert ("epoch 2/3" in text.getvalue()) == seen
    assert "done" not in text.getvalue()


def test_a_whole_run_is_told_epoch_by_epoch() -> None:
    text = StringIO()
    spec = job(run={"epochs": 4})
    display = Display(spec, GRID.num_batches, Console(file=text, width=200))

    class Watched(InProcess):
        def act(self, action: Any) -> None:
            super().act(action)
            display.show(self.coordinator, self.now)

    run = Watched(spec, GRID, START, quadratic, compute_s=lambda worker, batch: 0.001).run()
    assert run.finish is not None
    assert run.finish.status == "finished"
    told = [line.split("  ") for line in text.getvalue().splitlines()]
    assert [parts[0] for parts in told] == [f"epoch {n}/4 done" for n in (1, 2, 3, 4)]
    assert all(any(part.startswith("loss ") for part in parts) for parts in told)
