"""Estimate of a server's memory from its job, as the sum of the vectors that each part of the server keeps."""

from __future__ import annotations

from psgd.core.server.consistency import build_consistency
from psgd.core.server.corrections import build_correction
from psgd.core.server.epoch_weights import KEPT_EPOCHS
from psgd.core.server.optimizers import build_optimizer
from psgd.core.server.state import VectorCounts
from psgd.spec import JobSpec

__all__ = ["FLOAT32", "server_memory"]

WEIGHT_COPIES = KEPT_EPOCHS + 1  # copies of the weights: one for each of the newest epochs, and one being sent
STATE_COPIES = 3  # copies of a state while it is saved: its arrays, their bytes, and the content of the file
FLOAT32 = 4  # bytes of a value


def server_memory(spec: JobSpec, size: int, workers: int, connected: int = 0) -> int:
    """Estimate the peak memory of a server in bytes: its memory while it saves and keeps weights of past epochs.

    Args:
        spec: the job to train.
        size: number of values of the server's partition.
        workers: number of workers that push.
        connected: number of these workers whose lane (tcp or ray) copies the vectors into messages.
    """
    parts = _parts(spec, workers)
    push_vectors = 2 if spec.correction.reads_weights else 1  # vectors of one push
    vectors = (
        sum(part.held for part in parts)
        + STATE_COPIES * sum(part.saved for part in parts)
        + WEIGHT_COPIES
        + connected * (spec.scaling.pipeline + 1) * push_vectors
    )
    return FLOAT32 * size * vectors


def _parts(spec: JobSpec, workers: int) -> list[VectorCounts]:
    """Return the vectors of each part that lives as long as the server."""
    optimizer = spec.optimizer
    # These parts are built only to read their number of vectors; with size 0 they take no memory.
    correction = build_correction(spec, 0)
    aggregator = build_consistency(spec.consistency).aggregator(0, 0)
    elementwise = correction.elementwise or optimizer.clip_value is not None
    copies = workers if aggregator.keeps else 1  # number of decoded or corrected gradients at the same time
    return [
        VectorCounts(1, 1),  # the weights
        VectorCounts(1 if correction.shifts else 0),  # shifted weights that workers pull
        VectorCounts(1, 1) if optimizer.ema is not None else VectorCounts(0),
        VectorCounts(copies if elementwise else 0),
        VectorCounts(0) if spec.compression.name == "none" else VectorCounts(copies + 1 if aggregator.keeps else 1),
        build_optimizer(optimizer, 0).vectors(),
        correction.vectors(workers),
        aggregator.vectors(workers, scaled=optimizer.max_grad_norm is not None and not elementwise),
    ]
