"""MNIST trained beside kills at random, and what must be true of it in the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psgd

__all__ = ["BATCHES", "assert_as_if_undisturbed", "job"]

BATCHES = 469  # of an epoch
EXAMPLES = 60_000  # of an epoch


def job(tmp_path: Path, mnist_file: Path, epochs: int, seconds: float, **sections: Any) -> psgd.JobSpec:
    """A job of two workers and two servers, whose gradients take so much longer than their computation."""
    tree: dict[str, Any] = {
        "model": {"kind": "python", "path": "tests.support.faulty_models:mnist", "kwargs": {"seconds": seconds}},
        "data": {"format": "npz", "path": str(mnist_file), "batch_size": 128, "normalize": "unit"},
        "optimizer": {"lr": 0.1},
        "scaling": {"workers": 2, "servers": 2},
        "run": {"epochs": epochs, "storage": str(tmp_path)},
        "checkpoint": {"every_s": 2.0},
        "failure": {"max_failures": -1},
    }
    return psgd.JobSpec.model_validate(tree | sections)


def assert_as_if_undisturbed(result: psgd.Result, undisturbed: psgd.Result, epochs: int) -> None:
    """Every batch of every epoch was applied once, and what was learned is worth as much."""
    assert (result.status, result.epochs, result.samples) == ("finished", epochs, epochs * EXAMPLES)
    assert result.ledger.batches == result.ledger.applied == epochs * BATCHES
    expected, found = (one.metrics["val/accuracy"] for one in (undisturbed, result))
    assert expected is not None
    assert found is not None
    assert expected > 0.93
    assert abs(found - expected) < 0.01
