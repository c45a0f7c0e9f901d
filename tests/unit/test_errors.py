from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import psgd
import psgd_workers
from psgd import errors

NAMES = sorted(name for name in errors.__all__ if name != "PsgdError")


def drawn() -> dict[str, str]:
    """Yield each class of the tree in the module's docstring, with its base class."""
    above: dict[int, str] = {}
    parents: dict[str, str] = {}
    for line in str(errors.__doc__).splitlines():
        if found := re.match(r"([ │├└─]*)(\w+Error)\b", line):
            depth = len(found[1])
            name = found[2]
            above[depth] = name
            higher = [at for at in above if at < depth]
            if higher:
                parents[name] = above[max(higher)]
            above = {at: known for at, known in above.items() if at <= depth}
    return parents


@pytest.mark.parametrize("name", NAMES)
def test_the_tree_is_drawn_as_it_is(name: str) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, errors.PsgdError)
    assert kind.__bases__[0].__name__ == drawn()[name]


def test_every_error_is_in_the_tree() -> None:
    modules = (errors, psgd_workers.errors)
    classes = {name for module in modules for name, _ in inspect.getmembers(module, inspect.isclass) if "Error" in name}
    assert classes == set(errors.__all__)


def test_a_lane_error_says_what_kind_it_is() -> None:
    roots = [Path(str(package.__file__)).parent for package in (psgd, psgd_workers)]
    sources = [path for root in roots for path in root.rglob("*.py")]
    assert len(sources) > 100
    assert [
        path.name for path in sources if re.search(r"raise (LaneError|StateUnchangedError)\(", path.read_text())
    ] == []


def test_only_what_a_server_refuses_leaves_its_state_unchanged() -> None:
    kinds = {name for name in NAMES if issubclass(getattr(errors, name), errors.StateUnchangedError)}
    assert kinds == {"StateUnchangedError", "PushRefusedError", "WeightsNotKeptError"}
