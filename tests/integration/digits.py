"""The digits; a job on them that takes as long as a test needs, and what must be true of its run in the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psgd

__all__ = ["BATCHES", "DATA", "assert_exactly_once", "job"]

DATA = {"format": "sklearn", "dataset": "digits", "batch_size": 32, "normalize": "unit", "validation_fraction": 0.2}
BATCHES, EXAMPLES = 45, 1438  # of an epoch


def job(tmp_path: Path, epochs: int, **sections: Any) -> psgd.JobSpec:
    """A job on digits whose gradients take 10 ms."""
    tree: dict[str, Any] = {
        "name": "run",
        "model": {"kind": "python", "path": "tests.integration.faulty:slow", "kwargs": {"seconds": 0.01}},
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
