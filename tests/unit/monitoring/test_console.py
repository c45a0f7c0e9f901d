from __future__ import annotations

import ast
from pathlib import Path

import pytest

import psgd
from psgd.monitoring.console import stderr_console, warn


@pytest.mark.parametrize("text", ["mk[/b]d", "q[x]q", "[red]x", ":smile:", "\\[x]", "a\\", "[link=http://x]y[/link]"])
def test_text_is_printed_as_it_is(capsys: pytest.CaptureFixture[str], text: str) -> None:
    stderr_console().print(text)
    warn(text)
    assert capsys.readouterr() == ("", f"{text}\nwarning: {text}\n")


def test_no_other_module_makes_a_console_of_its_own() -> None:
    """A console that reads markup prints a user's `[x]` as nothing, and raises a MarkupError at `[/x]`."""
    folder = Path(psgd.__file__).parent
    calls = [
        f"{path.relative_to(folder)}:{node.lineno}"
        for path in folder.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and "Console" in ast.unparse(node.func).split(".")[-1:]
    ]
    assert [call.partition(":")[0] for call in calls] == ["monitoring/console.py"]
