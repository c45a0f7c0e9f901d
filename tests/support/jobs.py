"""Small jobs, and gradients with a closed form, that several tests share."""

from __future__ import annotations

from typing import Any

import numpy as np

from psgd.spec import JobSpec
from psgd_workers.messages import BatchId, Encoded, EpochGrid, FloatArray, Gradient, Version
from psgd_workers.transport.frames import PushHeader

__all__ = ["GRID", "START", "job", "push", "push_header", "quadratic"]

GRID = EpochGrid((5, 4), 9)
START = np.linspace(-1, 1, 6, dtype=np.float32)


def job(mode: str = "async", workers: int = 1, **sections: Any) -> JobSpec:
    """Return a job whose model and data are not used; `sections` replace those of the spec, `scaling` is merged."""
    plain = {
        "model": {"kind": "linear"},
        "data": {"format": "sklearn", "dataset": "iris"},
        "optimizer": {"lr": 0.1},
        "consistency": {"mode": mode},
        "scaling": {"workers": workers} | sections.pop("scaling", {}),
        "run": {"epochs": 1},
        "checkpoint": {"every_s": None},
    }
    return JobSpec.model_validate(plain | sections)


def quadratic(batch: BatchId, weights: FloatArray, out: FloatArray) -> float:
    """Compute ½·|w - target|² and its gradient; each batch has a target of its own."""
    target = np.random.default_rng([*batch]).standard_normal(len(weights), dtype=np.float32)
    np.subtract(weights, target, out=out)
    return 0.5 * float(np.dot(out, out))


def push(
    batch: BatchId,
    read: Version,
    *,
    worker: str = "worker-0",
    values: FloatArray | None = None,
    examples: int = 1,
    loss: float = 1.0,
    norm: float | None = None,
    number: int = 1,
) -> Gradient:
    """Return a push of a gradient of ones, or of `values`."""
    values = np.ones_like(START) if values is None else values
    norm = float(np.linalg.norm(values)) if norm is None else norm
    return Gradient(worker, 0, number, batch, examples, read, values, loss, norm, 0.01)


def push_header(gradient: Gradient, slot: int, wants: bool, incarnation: int, payload: int) -> bytes:
    """Return the header of a push, as a lane sends it."""
    encoding = gradient.values.kind if isinstance(gradient.values, Encoded) else ""
    return bytes(PushHeader(slot, encoding, incarnation).write(gradient, payload, wants))
