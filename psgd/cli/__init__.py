"""The `psgd` command. It parses its arguments first, and imports Ray and pydantic only for commands that need them.

Exit codes: 0 finished, or stopped by `psgd stop`; 2 the job or another input was refused; 3 the run or a check failed;
130 interrupted by a signal.
"""

from __future__ import annotations

import os
import sys
from functools import partial

from psgd.interruption import Abandoned, Interruption, run_interruptibly

__all__ = ["FAILED", "INTERRUPTED", "REFUSED", "main"]

REFUSED = 2
FAILED = 3
INTERRUPTED = 130


def main() -> None:
    """Run the `psgd` command."""
    interruption = Interruption()
    try:
        run_interruptibly(partial(_run, interruption), interruption)
    except Abandoned:
        os._exit(INTERRUPTED)  # at once: the thread of the command still runs
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _run(interruption: Interruption) -> None:
    from psgd.cli.app import app
    from psgd.errors import PsgdError, RunError
    from psgd_workers.redaction import printable

    try:
        app(obj=interruption)
    except PsgdError as error:
        lines = [printable(line) for line in str(error).split("\n")]
        print("psgd:", "\n".join(lines), file=sys.stderr)  # noqa: T201 - the command's own output
        sys.exit(FAILED if isinstance(error, RunError) else REFUSED)
