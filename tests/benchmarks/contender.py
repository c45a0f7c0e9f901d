"""One contender, run as a process with a time limit that leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from tempfile import TemporaryDirectory

from tests.benchmarks.crew import ONE_THREAD
from tests.benchmarks.measurement import Measurement

__all__ = ["CONTENDERS", "Failure", "run_contender"]

CONTENDERS = {  # modules of `peers`, and what they are
    "psgd_job": "psgd, async",
    "numpy_loops": "two NumPy loops that share nothing (the limit)",
    "hogwild": "PyTorch Hogwild",
    "ddp_gloo": "PyTorch DDP on gloo, gradients",
    "ray_documented": "Ray's documented parameter server",
}
GRACE_S = 15.0  # to tidy up in, before being killed
LEARNED = 0.5  # test accuracy; guessing has 0.1, and 300 updates of any contender about 0.85


@dataclass(frozen=True, slots=True)
class Failure:
    """A run that measured nothing."""

    name: str
    error: str


def run_contender(name: str, seconds: float, limit_s: float) -> Measurement | Failure:
    """Run a contender once.

    Args:
        name: one of `CONTENDERS`.
        seconds: how long it measures.
        limit_s: how long it may take in all, in seconds.
    """
    command = [sys.executable, "-m", f"tests.benchmarks.peers.{name}", "--seconds", str(seconds)]
    with (
        TemporaryDirectory(prefix="b") as folder,  # short: Ray puts sockets in it, whose paths are limited
        subprocess.Popen(
            command,
            env=os.environ | ONE_THREAD | {"TMPDIR": folder},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        try:
            output, errors = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            return Failure(name, f"not done after {limit_s:g} s")
        finally:
            _end(process)
    return _judged(name, process.returncode, output.splitlines(), errors.splitlines())


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()  # so that it unlinks its semaphores, and Ray ends its cluster
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=GRACE_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _judged(name: str, returncode: int, output: list[str], errors: list[str]) -> Measurement | Failure:
    if returncode or not output:
        said = [line for line in errors if line.strip()]
        return Failure(name, said[-1] if said else f"exit code {returncode}, and not a word")
    measurement = Measurement(**json.loads(output[-1]))
    if measurement.val_accuracy < LEARNED:
        return Failure(name, f"it learned nothing: its test accuracy is {measurement.val_accuracy}")
    return measurement
