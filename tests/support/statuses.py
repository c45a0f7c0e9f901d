"""A `RunStatus` for tests of its readers: one worker, one server, nothing measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from psgd.core.driver.status import CheckpointStatus, EpochStatus, RunStatus, ServerStatus, WorkerStatus
from psgd.result import LedgerCounts
from psgd_workers.messages import Evaluation

__all__ = ["epoch", "status"]

BEFORE = RunStatus(
    now=0.0,
    phase="training",
    waiting_for=(),
    began=0.0,
    epochs=0,
    batches=0,
    num_batches=10,
    open_leases=0,
    updates=0,
    examples=0,
    updates_per_s=None,
    examples_per_s=None,
    bytes_per_push=None,
    compiled=None,
    residual_norm=0.0,
    loss=None,
    loss_epoch=None,
    validation=None,
    validation_epoch=None,
    recent_epochs=(),
    workers=(WorkerStatus("worker-0", "working", True, 0, 1, 10, None, 0.0),),
    target_workers=1,
    servers=(ServerStatus(0, "up", 1, 0, 0.0),),
    staleness={},
    failures={},
    charged_failures=0,
    goodput=None,
    ledger=LedgerCounts(0, 0, 0, 0, 0),
    checkpoint=CheckpointStatus(None, 0, writing=False, last=False, retries=False, fault=None),
)


def epoch(
    number: int, loss: float | None = None, accuracy: float | None = None, validating: bool = False
) -> EpochStatus:
    """Return a complete epoch; without an accuracy it has no validation."""
    validation = None if accuracy is None else Evaluation(1.0 - accuracy, accuracy, 100)
    return EpochStatus(number, loss, validation, validating)


def status(recent_epochs: Sequence[EpochStatus] = (), **fields: Any) -> RunStatus:
    """Return the status of a run after these epochs; `fields` replace those of the default."""
    fields.setdefault("epochs", recent_epochs[-1].epoch if recent_epochs else 0)
    return replace(BEFORE, recent_epochs=tuple(recent_epochs), **fields)
