"""Compile the push path of a server into the cache: `python -m psgd.serving.compiled FOLDER`.

FOLDER is the folder of the cache. Processes that compile into the same folder take turns, and the later ones find the
code there. See `compiler`, which starts this process.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread

__all__ = ["end_with_parent", "main", "turn"]

# That of Ray's workers and servers: other processes go first. With 19, the lowest priority, a run on busy processors
# made 7 % more gradients a second until the code was there, but that took half as long again.
NICENESS = 15
STDIN = 0


def main() -> None:
    """Compile at low priority, as long as the parent lives."""
    end_with_parent()
    os.setpriority(os.PRIO_PROCESS, 0, max(NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))
    (folder,) = sys.argv[1:]
    with turn(Path(folder)):
        _compile()


def end_with_parent() -> None:
    """End this process as soon as its stdin ends: a pipe whose other end only the parent holds, and never writes to.

    The kernel closes that end however the parent ends. A signal at the parent's end, as Linux has it, would come when
    the thread ends that started this process.
    """
    Thread(target=_exit_at_end_of_stdin, daemon=True).start()


def _exit_at_end_of_stdin() -> None:
    os.read(STDIN, 1)
    os._exit(1)


@contextmanager
def turn(folder: Path) -> Iterator[None]:
    """Wait until no other process has its turn in this folder. A process that ends, however it does, ends its turn."""
    with (folder / "lock").open("w") as file:
        with suppress(OSError):  # a file system without locks: the same code may be compiled twice, which does no harm
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile() -> None:
    """Load the push path of the smallest server: code that is not in the cache is compiled, and kept there."""
    # Imported here, because a process that waits for its turn needs none of this.
    import numpy as np

    from psgd.core.server.parameter_server import ParameterServer
    from psgd.core.server.partitions import Partition
    from psgd.serving.compiled.path import CompiledPath
    from psgd.serving.server_lock import ServerLock
    from psgd.spec import JobSpec
    from psgd_workers.messages import EpochGrid, Version

    spec = JobSpec.model_validate(
        {
            "model": {"kind": "linear"},
            "data": {"format": "sklearn", "dataset": "iris"},
            "optimizer": {"lr": 1.0},
            "run": {"epochs": 1},
        }
    )
    weights = np.zeros(1, np.float32)
    server = ParameterServer(spec, Partition(0, 0, 1, 1), weights, EpochGrid((1,), 1), Version(1, 0))
    CompiledPath(server, ServerLock())


if __name__ == "__main__":
    main()
