from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from typing import Any

import pytest

COMMANDS = [
    *("train", "submit", "status", "logs", "stop", "set", "scale"),
    *("validate", "schema", "simulate", "verify", "replay"),
]
LIMIT_S = 60


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["submit", "-h"], ["--version"]])
def test_help_and_version_import_nothing_heavy(arguments: list[str]) -> None:
    heavy = {
        "ray",
        "numpy",
        "torch",
        "fsspec",
        "yaml",
        "psgd.spec",
    }  # not pydantic, which typer loads for its own options
    report = f"print({heavy} & set(sys.modules), file=sys.stderr)"
    script = f"import sys, atexit; atexit.register(lambda: {report}); from psgd.cli import main; main()"
    told = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60)
    assert told.returncode == 0
    assert told.stderr == "set()\n"
    assert told.stdout == f"psgd {version('psgd')}\n" if arguments == ["--version"] else "Usage" in told.stdout


def test_every_command_has_help_in_plain_text(psgd: Any) -> None:
    code, out, err = psgd("--help")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.split("Commands:\n")[1].split("\n\n")[0].splitlines()] == COMMANDS
    for command in COMMANDS:
        code, out, err = psgd(command, "--help")
        assert (code, err) == (0, "")
        assert not set("\\`{}") & set(out.partition("Options:")[2].replace("`psgd", ""))  # no markup


def test_the_extra_that_figures_need_is_written_as_pip_takes_it(psgd: Any) -> None:
    assert "'psgd[plots]'" in " ".join(psgd("simulate", "--help")[1].split())


def started(*arguments: str, hook: str = "") -> subprocess.Popen[str]:
    """Start a command in a new process, after the code `hook`."""
    script = f"import os, signal, sys, threading\nfrom psgd.cli import main\n{hook}\nmain()"
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


BLOCK = """
import psgd.{module} as module

def block(*arguments, **options):
    os.kill(os.getpid(), signal.{number})
    threading.Event().wait()

module.{function} = block
"""


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize(
    ("arguments", "module", "function"),
    [
        (("validate", "job.yaml"), "spec.reader", "load_spec"),
        (("train", "job.yaml"), "spec.reader", "load_spec"),
        (("simulate", "job.yaml"), "simulation.command", "run"),
        (("verify", "job.yaml"), "simulation.verify", "verify"),
        (("replay", "iris"), "replay.replay", "replay"),
        (("logs", "iris"), "store.run_directory", "parse_lines"),
    ],
    ids=lambda words: words[0] if isinstance(words, tuple) else None,
)
@pytest.mark.usefixtures("run")
def test_a_signal_ends_any_command_with_130_and_one_sentence(
    arguments: tuple[str, ...], module: str, function: str, number: str
) -> None:
    with started(*arguments, hook=BLOCK.format(module=module, function=function, number=number)) as process:
        out, err = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, out, err) == (130, "", "psgd: interrupted\n")


def test_a_signal_while_modules_are_imported_is_not_lost() -> None:
    hook = """
class Finder:
    def find_spec(self, name, path, target=None):
        if name == "typer":
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait()

sys.meta_path.insert(0, Finder())
"""
    with started("--help", hook=hook) as process:
        out, err = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, out, err) == (130, "", "psgd: interrupted\n")
