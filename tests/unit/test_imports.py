"""Each import contract can fail, and the table in psgd/README.md agrees with the contracts."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
LINTER = Path(sys.executable).with_name("lint-imports")


class Forbidden(NamedTuple):
    """An import that a contract must refuse."""

    contract: str
    file: str  # file that gets the import; created if it does not exist
    statement: str


FORBIDDEN = [
    Forbidden("Rooms of psgd import one way", "psgd/core/server/tally.py", "from psgd.job import OpenJob"),
    Forbidden("Rooms of psgd import one way", "psgd/core/server/tally.py", "from psgd.store.storage import Storage"),
    Forbidden("Rooms of psgd import one way", "psgd/store/storage.py", "import psgd.serving.host"),
    Forbidden("Rooms of psgd import one way", "psgd/unlisted.py", "import psgd.errors"),
    Forbidden(
        "The driver imports the server, never the other way round",
        "psgd/core/server/tally.py",
        "from psgd.core.driver.ledger import Ledger",
    ),
    Forbidden(
        "Rooms of psgd_workers import one way",
        "workers/psgd_workers/gradients/layout.py",
        "from psgd_workers.transport import frames",
    ),
    Forbidden("Workers import neither psgd nor ray nor numba", "workers/psgd_workers/messages.py", "import ray"),
    Forbidden("Only the cluster imports ray", "psgd/serving/host.py", "import ray"),
    Forbidden(
        "The core imports no disk, network, thread, process or clock", "psgd/core/server/tally.py", "import threading"
    ),
    Forbidden(
        "The core imports five modules of psgd_workers",
        "psgd/core/server/tally.py",
        "from psgd_workers.transport import frames",
    ),
]


def contracts() -> list[dict[str, Any]]:
    """Return the import contracts of pyproject.toml."""
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert isinstance(tables, list)
    return tables


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the sources and of the contracts."""
    copy = tmp_path_factory.mktemp("tree")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "psgd", copy / "psgd", ignore=ignored)
    shutil.copytree(ROOT / "workers", copy / "workers", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


@pytest.fixture
def added(tree: Path, request: pytest.FixtureRequest) -> Iterator[Forbidden]:
    """Add a forbidden import to the copy during one test."""
    case: Forbidden = request.param
    file = tree / case.file
    before = file.read_text() if file.exists() else None
    file.write_text(f"{before or ''}\n{case.statement}\n")
    yield case
    if before is None:
        file.unlink()
    else:
        file.write_text(before)


def broken(tree: Path) -> set[str]:
    """Return the names of the contracts that the linter finds broken."""
    run = subprocess.run(
        [LINTER, "--no-cache"],
        cwd=tree,
        env={"PYTHONPATH": f"{tree}:{tree / 'workers'}", "PATH": str(LINTER.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Contracts:" in run.stdout, run.stdout + run.stderr
    return set(re.findall(r"^(.+) BROKEN$", run.stdout, re.MULTILINE))


def test_the_sources_keep_every_contract(tree: Path) -> None:
    assert broken(tree) == set()


@pytest.mark.parametrize("added", FORBIDDEN, indirect=True, ids=lambda case: f"{case.file}: {case.statement}")
def test_a_forbidden_import_breaks_its_contract(tree: Path, added: Forbidden) -> None:
    assert added.contract in broken(tree)


def test_every_contract_has_an_import_that_breaks_it() -> None:
    assert {case.contract for case in FORBIDDEN} == {contract["name"] for contract in contracts()}


def test_the_architecture_guide_lists_the_layers_as_they_are_checked() -> None:
    layers = [[room.strip() for room in layer.split("|")] for layer in contracts()[0]["layers"]]
    below = list(accumulate(reversed(layers), lambda lower, layer: [*layer, *lower], initial=list[str]()))[-2::-1]
    above = list(accumulate(layers, lambda upper, layer: [*upper, *layer], initial=list[str]()))[:-1]
    section = (ROOT / "psgd/README.md").read_text().partition("\n## Rooms\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \| ([^|]+) \|$", section, re.MULTILINE)
    shown = {room: (may.split(", "), by.split(", ")) for room, may, by in rows}
    assert shown == {
        room: (lower or ["nothing"], upper or ["nothing"])
        for layer, lower, upper in zip(layers, below, above, strict=True)
        for room in layer
    }
