"""The command line. It parses first, and imports Ray, pydantic and the rest only for a command that needs them.

Exit codes: 0 finished (or stopped by command), 2 refused spec or input, 3 failed run, 130 interrupted.
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
        os._exit(INTERRUPTED)  # the command's thread is still at work
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _run(interruption: Interruption) -> None:
    from psgd.cli.app import app
    from psgd.errors import PsgdError, RunError

    try:
        app(obj=interruption)
    except PsgdError as error:
        print(f"psgd: {error}", file=sys.stderr)  # noqa: T201 - the command's own output
        sys.exit(FAILED if isinstance(error, RunError) else REFUSED)
