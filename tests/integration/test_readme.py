"""The commands of the README's tour work, and print what it shows."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.command_line import CommandLine, eventually, recorded

ROOT = Path(__file__).parents[2]
LIMIT_S = 120.0


class Step(NamedTuple):
    """A command of the tour, and the lines of its output that the README shows."""

    command: str
    shown: list[str]


def steps() -> Iterator[Step]:
    """Yield the commands of the README's console blocks, in order."""
    for block in re.findall(r"```console\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, *shown = part.splitlines()
            yield Step(command, shown)


def pattern(line: str) -> str:
    """Return a pattern for a line of output. `...` stands for any text; numbers and widths may differ."""
    words = re.split(r"(\.\.\.|\s+|\d+(?:\.\d+)?)", line.rstrip())
    general = {"...": ".*"}
    return "".join(
        general.get(word) or (r"\s+" if word.isspace() else r"[\d.]+" if word[:1].isdigit() else re.escape(word))
        for word in words
        if word
    )


def test_a_line_of_the_tour_is_compared_but_for_its_numbers() -> None:
    assert re.match(pattern("epoch  1/30  loss 1.03"), "epoch 12/30  loss 0.5  val acc 0.9")
    assert re.match(pattern('{"status": "running", ...'), '{"status": "running", "last_sign_s": 0.1}')
    assert not re.match(pattern("epoch 1/30  loss 1.03"), "epoch 1/30  lost 1.03")


@pytest.mark.timeout(400)
def test_the_tour_works_as_the_readme_shows_it(environment: Mapping[str, str], tmp_path: Path) -> None:
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    psgd = CommandLine(environment, tmp_path, limit_s=LIMIT_S)
    tour = [step for step in steps() if step.command.startswith("psgd ")]
    assert len(tour) >= 10
    with ExitStack() as stack:
        background: subprocess.Popen[str] | None = None
        for step in tour:
            words = shlex.split(step.command.removesuffix("&"))[1:]
            if step.command.endswith("&"):
                background = stack.enter_context(psgd.started(*words))
                eventually(lambda: recorded(tmp_path / "runs" / "long", "evaluated"), LIMIT_S)
                continue
            done = psgd.run(*words)
            assert done.returncode == 0, (step.command, done.stderr)
            if words[0] == "stop":
                assert background is not None
                background.communicate(timeout=LIMIT_S)
            printed = iter((done.stderr + done.stdout).splitlines())
            for line in step.shown:
                if line != "...":
                    assert any(re.match(pattern(line), each) for each in printed), (step.command, line)
