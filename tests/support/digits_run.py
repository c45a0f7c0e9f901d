"""A job on scikit-learn's digits, and checks of its result.

A test that disturbs a run while it trains gives the job `ENDLESS` epochs and stops it afterwards, so that the run
cannot end first on a fast machine.
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
    "stop_after_epochs",
    "training",
]

DATA = {"format": "sklearn", "dataset": "digits", "batch_size": 32, "normalize": "unit", "validation_fraction": 0.2}
BATCHES = 45  # in an epoch
EXAMPLES = 1438  # in an epoch
ENDLESS = 100_000  # epochs


def job(tmp_path: Path, epochs: int, **sections: Any) -> psgd.JobSpec:
    """Return a job on digits whose gradients take 10 ms; `sections` replace those of the spec."""
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
    """Check that every epoch is complete and that every batch was applied once."""
    assert (result.status, result.epochs, result.samples) == ("finished", epochs, epochs * EXAMPLES)
    assert result.ledger.batches == result.ledger.applied == epochs * BATCHES


@contextmanager
def training(spec: psgd.JobSpec, resume: bool = False) -> Iterator[Future[psgd.Result]]:
    """Train in another thread while the block lasts; stop the run at the end of the block if it still trains."""
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(psgd.train, spec, resume=resume, progress=False)
        try:
            yield under_way
        finally:
            if not under_way.done():
                stop(Path(spec.run.storage) / "run")


def stop(run: Path) -> None:
    """Ask the run in this directory to save and end."""
    RunDirectory(Storage(str(run))).command("stop")


def stop_after_epochs(run: Path, epochs: int = 2) -> None:
    """Wait until a run has validated this number of further epochs, then stop it."""
    seen = len(recorded(run, "evaluated"))
    eventually(lambda: len(recorded(run, "evaluated")) >= seen + epochs)
    stop(run)


def assert_stopped_exactly(result: psgd.Result) -> None:
    """Check that a run ended by `stop`, and that every batch in its ledger was applied once."""
    assert result.status == "stopped"
    assert result.ledger.batches == result.ledger.applied
    assert result.ledger.batches // BATCHES == result.epochs > 0
    assert result.epochs * EXAMPLES <= result.samples < (result.epochs + 1) * EXAMPLES
