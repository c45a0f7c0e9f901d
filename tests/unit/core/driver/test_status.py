from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import psgd
from psgd.core.driver.coordinator import Coordinator
from psgd.core.driver.status import CheckpointStatus
from psgd_workers.messages import EpochGrid
from tests.support.jobs import job
from tests.support.statuses import status

PSGD = Path(psgd.__file__).parent
INTERFACE = {"handle", "next_deadline", "status"}


def modules() -> Iterator[Path]:
    return (path for path in PSGD.rglob("*.py") if PSGD / "core" not in path.parents)


def touched(source: str) -> set[str]:
    """Return the attributes that are read or written of any expression named `coordinator` or `_coordinator`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            match node.value:
                case ast.Name(id="coordinator" | "_coordinator") | ast.Attribute(attr="coordinator" | "_coordinator"):
                    found.add(node.attr)
    return found


def test_a_coordinator_shows_what_it_is_told_what_it_waits_for_and_its_status() -> None:
    coordinator = Coordinator(job(), EpochGrid((4,), 4), validates=False)
    assert {name for name in dir(coordinator) if not name.startswith("_")} == INTERFACE


def test_a_coordinator_has_no_other_attribute_outside_the_core() -> None:
    found = {str(path.relative_to(PSGD)): touched(path.read_text()) for path in modules()}
    assert {name: names for name, names in found.items() if not names <= INTERFACE} == {}
    assert found["cluster/supervisor.py"] == INTERFACE  # the search does find attributes


@pytest.mark.parametrize("line", ["coordinator.ledger.done", "self._coordinator._phase", "host.coordinator.epochs = 3"])
def test_an_attribute_that_is_touched_is_found(line: str) -> None:
    assert len(touched(line)) == 1


def test_what_shows_a_run_imports_no_part_of_the_core_but_the_status() -> None:
    imported = {
        node.module
        for path in (PSGD / "monitoring").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("psgd.core")
    }
    assert imported == {"psgd.core.server.report", "psgd.core.driver.status"}  # `report` for `staleness_summary`


def test_training_has_lasted_since_it_began() -> None:
    assert status(now=7.0, began=3.0).elapsed_s == 4.0
    assert status(now=7.0, began=None).elapsed_s == 0.0


@pytest.mark.parametrize(
    ("updates", "text"),
    [(None, "nothing is saved"), (12, "the newest checkpoint contains 12 updates and 3 complete epochs")],
)
def test_a_checkpoint_is_described_for_people(updates: int | None, text: str) -> None:
    assert CheckpointStatus(updates, 3, writing=False, last=False, retries=False, fault=None).text == text
