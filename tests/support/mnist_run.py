"""A job on MNIST for tests that kill processes at random, and the check of its result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psgd

__all__ = ["BATCHES", "assert_as_if_undisturbed", "job"]

BATCHES = 469  # in an epoch
EXAMPLES = 60_000  # in an epoch


def job(tmp_path: Path, mnist_file: Path, epochs: int, seconds: float, **sections: Any) -> psgd.JobSpec:
    """Return a job of two workers and two servers.

    Args:
        tmp_path: storage of the run.
        mnist_file: path of `mnist.npz`.
        epochs: epochs to train.
        seconds: sleep before each gradient, in seconds.
        sections: sections that replace those of the spec.
    """
    tree: dict[str, Any] = {
        "model": {"kind": "python", "path": "tests.support.faulty_models:slow_mnist", "kwargs": {"seconds": seconds}},
        "data": {"format": "npz", "path": str(mnist_file), "batch_size": 128, "normalize": "unit"},
        "optimizer": {"lr": 0.1},
        "scaling": {"workers": 2, "servers": 2},
        "run": {"epochs": epochs, "storage": str(tmp_path)},
        "checkpoint": {"every_s": 2.0},
        "failure": {"max_failures": -1},
    }
    return psgd.JobSpec.model_validate(tree | sections)


def assert_as_if_undisturbed(result: psgd.Result, undisturbed: psgd.Result, epochs: int) -> None:
    """Check that every batch was applied once, and that the accuracy is within 0.01 of an undisturbed run's."""
    assert (result.status, result.epochs, result.samples) == ("finished", epochs, epochs * EXAMPLES)
    assert result.ledger.batches == result.ledger.applied == epochs * BATCHES
    expected, found = (one.metrics["val/accuracy"] for one in (undisturbed, result))
    assert expected is not None
    assert found is not None
    assert expected > 0.93
    assert abs(found - expected) < 0.01
