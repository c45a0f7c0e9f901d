"""Run one contender as a process with a time limit, and end all processes that it started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from typing import NamedTuple

from rich.console import Console

from tests.benchmarks.cores import round_trip_ns, shown
from tests.benchmarks.measurement import Measurement
from tests.benchmarks.process_group import ONE_THREAD

__all__ = ["CONTENDERS", "LIMIT", "Contender", "Failure", "run_contender", "run_turn"]


class Contender(NamedTuple):
    """A program that is compared with psgd."""

    title: str
    module: str  # in `peers`
    options: tuple[str, ...] = ()  # of its command line
    target: float | None = None  # least ratio of psgd's gradients per second to its own; None: no target
    share: float | None = None  # least ratio of its own gradients per second to the limit's; None: no target


LIMIT = "own_loops"  # the most that two cores can do: the same backpropagation, with nothing shared
CONTENDERS = {
    "psgd_job": Contender("psgd, async", "psgd_job"),
    LIMIT: Contender("two separate psgd loops: the limit", "own_loops", target=0.82),
    "numpy_loops": Contender("two separate NumPy loops", "numpy_loops", target=0.9),
    "hogwild": Contender("PyTorch Hogwild", "hogwild", target=1.1),
    "ddp_gloo": Contender("PyTorch DDP on gloo", "ddp_gloo", target=3.0),
    "ray_documented": Contender("Ray's documented parameter server", "ray_documented", target=10.0),
    "psgd_unvalidated_job": Contender(
        "psgd, async, validating at the end", "psgd_job", ("--set", "run.validate_every=0"), share=0.88
    ),
    "psgd_bare": Contender("psgd, async, without Ray", "psgd_bare", share=0.93),
    "psgd_tcp_job": Contender("psgd, async, by lane tcp", "psgd_job", ("--set", "scaling.lane=tcp")),
    "psgd_ray_job": Contender("psgd, async, by lane ray", "psgd_job", ("--set", "scaling.lane=ray")),
}
GRACE_S = 15.0  # from SIGTERM to SIGKILL
LEARNED = 0.5  # least test accuracy; guessing gives 0.1, and 300 updates of any contender about 0.85


@dataclass(frozen=True, slots=True)
class Failure:
    """A run without a measurement."""

    name: str
    error: str


def run_contender(name: str, seconds: float, limit_s: float, options: Sequence[str] = ()) -> Measurement | Failure:
    """Run a contender once.

    Args:
        name: one of `CONTENDERS`.
        seconds: duration of the measurement, in seconds.
        limit_s: time limit of the whole run, in seconds.
        options: further options of its command line.
    """
    contender = CONTENDERS[name]
    command = [sys.executable, "-m", f"tests.benchmarks.peers.{contender.module}", "--seconds", str(seconds)]
    with (
        TemporaryDirectory(prefix="b") as folder,  # short: Ray makes sockets there, whose paths are limited
        subprocess.Popen(
            [*command, *contender.options, *options],
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


def run_turn(
    turn: str, name: str, seconds: float, limit_s: float, options: Sequence[str] = ()
) -> Measurement | Failure:
    """Run a contender once as `run_contender` does, after a message between the cores, and print both results.

    Args:
        turn: beginning of the printed line.
        name: one of `CONTENDERS`.
        seconds: duration of the measurement, in seconds.
        limit_s: time limit of the whole run, in seconds.
        options: further options of its command line.

    Returns:
        The outcome; `details` of a measurement has the time of the message as `round_trip_ns`, if there is one.
    """
    apart_ns = round_trip_ns()
    outcome = run_contender(name, seconds, limit_s, options)
    result = f"failed: {outcome.error}" if isinstance(outcome, Failure) else f"{outcome.updates_per_s:,.0f}/s"
    line = f"{turn} {name} {result} {shown(apart_ns)}".rstrip()
    Console().print(line, markup=False, highlight=False, soft_wrap=True)
    if isinstance(outcome, Failure) or apart_ns is None:
        return outcome
    return replace(outcome, details=outcome.details | {"round_trip_ns": apart_ns})


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()  # so that it unlinks its semaphores, and Ray ends its cluster
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=GRACE_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _judged(name: str, returncode: int, output: list[str], errors: list[str]) -> Measurement | Failure:
    if returncode or not output:
        messages = [line for line in errors if line.strip()]
        return Failure(name, messages[-1] if messages else f"exit code {returncode} without a message")
    measurement = Measurement(**json.loads(output[-1]) | {"name": name})
    if measurement.val_accuracy < LEARNED:
        return Failure(
            name, f"it learned nothing: its test accuracy is {measurement.val_accuracy}, expected at least {LEARNED}"
        )
    return measurement
