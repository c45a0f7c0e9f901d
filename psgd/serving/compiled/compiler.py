"""Starts the process that compiles the push path, so that the server's interpreter stays free for pushes.

In the server's own process, compiling would hold the interpreter's lock most of the time, for 15 s.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from psgd.errors import NotCompiledError

__all__ = ["command", "compile_apart"]

LIMIT_S = 600.0  # seconds; beside busy workers, compiling takes half a minute


def command(folder: str) -> Sequence[str]:
    """Return the command that compiles; see `psgd.serving.compiled.__main__`."""
    return [sys.executable, "-P", "-m", "psgd.serving.compiled", folder]


def compile_apart(folder: str) -> None:
    """Compile the push path in a process of its own. Return when the code is in the cache.

    The process does not outlive this one: it ends when the pipe that is its stdin does.

    Args:
        folder: folder of the cache.

    Raises:
        NotCompiledError: the process failed, or took longer than `LIMIT_S`; then it has been ended.
    """
    stdin, held_end = os.pipe()
    modules = os.pathsep.join(path for path in sys.path if path)  # also those that Ray has shipped
    try:
        subprocess.run(  # noqa: S603
            command(folder),
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": modules},
            text=True,
            errors="replace",
            timeout=LIMIT_S,
            check=True,
        )
    except subprocess.TimeoutExpired as error:
        raise NotCompiledError(f"compiling it took longer than {LIMIT_S:g} s") from error
    except subprocess.CalledProcessError as error:
        last_line = error.stderr.strip().rpartition("\n")[2]
        raise NotCompiledError(f"the process that compiles ended with {error.returncode}: {last_line}") from error
    except OSError as error:
        raise NotCompiledError(f"no process that compiles could be started: {error}") from error
    finally:
        os.close(stdin)
        os.close(held_end)
