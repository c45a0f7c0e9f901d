"""One assignment per line, and docstrings that begin with a verb or a noun."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(file for room in ("psgd", "workers", "tests") for file in (ROOT / room).rglob("*.py"))
BANNED = {"What", "Whether", "Whose", "Who", "Theirs", "Nobody", "Everybody", "Those", "So", "Likewise"}


def packed(tree: ast.AST) -> Iterator[ast.Assign]:
    """Yield the assignments of several values in one line that are no swap."""
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Tuple() as targets], value=ast.Tuple() as values):
                assigned = {ast.unparse(target) for target in targets.elts}
                if assigned.isdisjoint(ast.unparse(value) for value in values.elts):
                    yield node


def first_words(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the first word of each docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), text.split()[0].strip(".,:;")


def faults(source: str) -> list[str]:
    """Return a line for each fault of a module."""
    tree = ast.parse(source)
    lines = [f"{node.lineno}: {ast.unparse(node)}: write one assignment per line" for node in packed(tree)]
    return lines + [
        f"{line}: a docstring begins with {word!r}: begin with a verb or a noun phrase that stands alone"
        for line, word in first_words(tree)
        if word in BANNED
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_assignments_and_docstrings_are_plain(file: Path) -> None:
    assert not faults(file.read_text(encoding="utf-8"))


def test_a_packed_assignment_is_a_fault_and_a_swap_or_an_unpacked_call_is_none() -> None:
    assert faults("a, b = 1, 2") == ["1: a, b = (1, 2): write one assignment per line"]
    assert faults("a, b = b, a\nc, d = divmod(7, 2)\n") == []


def test_a_docstring_that_begins_with_a_question_word_is_a_fault() -> None:
    assert len(faults('"""What it is."""\ndef f():\n    """Nobody waits."""\n')) == 2
    assert faults('"""A noun phrase."""\ndef f():\n    """Return it."""\n') == []
