"""The digits; a job on them that takes as long as a test needs, and what must be true of its run in the end.

What is done to a run while it trains is done to one that is `ENDLESS`, and is then stopped: a machine may be fast.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psgd
from psgd.store.run_directory import RunDirectory
from psgd.store.storage import Storage
from tests.support.command_line import eventually, recorded

__all__ = [
    "BATCHES",
    "DATA",
    "ENDLESS",
    "assert_exactly_once",
    "assert_stopped_exactly",
    "job",
    "stop",
    "stop_later",
    "training",
]

DATA = {"format": "sklearn", "dataset": "digits", "batch_size": 32, "normalize": "unit", "validation_fraction": 0.2}
BATCHES = 45  # of an epoch
EXAMPLES = 1438  # of an epoch
ENDLESS = 100_000  # epochs


def job(tmp_path: Path, epochs: int, **sections: Any) -> psgd.JobSpec:
    """A job on digits whose gradients take 10 ms."""
    tree: dict[str, Any] = {
        "name": "run",
        "model": {"kind": "python", "path": "tests.support.faulty_models:slow", "kwargs": {"seconds": 0.01}},
        "data": DATA,
        "optimizer": {"lr": 0.2},
        "scaling": {"workers": 2},
        "run": {"epochs": epochs, "storage": str(tmp_path)},
        "checkpoint": {"every_s": 1.0},
        "failure": {"max_failures": -1},
    }
    return psgd.JobSpec.model_validate(tree | sections)


def assert_exactly_once(result: psgd.Result, epochs: int) -> None:
    """Every epoch is complete, and every batch of it was applied once."""
    assert (result.status, result.epochs, result.samples) == ("finished", epochs, epochs * EXAMPLES)
    assert result.ledger.batches == result.ledger.applied == epochs * BATCHES


@contextmanager
def training(spec: psgd.JobSpec, resume: bool = False) -> Iterator[Future[psgd.Result]]:
    """A run under way, which ends with the block at the latest."""
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(psgd.train, spec, resume=resume, progress=False)
        try:
            yield under_way
        finally:
            if not under_way.done():
                stop(Path(spec.run.storage) / "run")


def stop(run: Path) -> None:
    """Let a run end where it is."""
    RunDirectory(Storage(str(run))).command("stop")


def stop_later(run: Path, epochs: int = 2) -> None:
    """Let a run go on for so many epochs, and end where it is then."""
    seen = len(recorded(run, "evaluated"))
    eventually(lambda: len(recorded(run, "evaluated")) >= seen + epochs)
    stop(run)


def assert_stopped_exactly(result: psgd.Result) -> None:
    """It ended because it was told to, and every batch that it tells of was applied once."""
    assert result.status == "stopped"
    assert result.ledger.batches == result.ledger.applied
    assert result.ledger.batches // BATCHES == result.epochs > 0
    assert result.epochs * EXAMPLES <= result.samples < (result.epochs + 1) * EXAMPLES
