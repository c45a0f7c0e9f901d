"""Estimate of a server's memory from the job alone: every part of a server states the number of vectors it keeps."""

from __future__ import annotations

from psgd.core.server.consistency import build_consistency
from psgd.core.server.corrections import build_correction
from psgd.core.server.optimizers import build_optimizer
from psgd.core.server.parameter_server import KEPT_EPOCHS
from psgd.core.server.state import Vectors
from psgd.spec import JobSpec

__all__ = ["FLOAT32", "server_memory"]

WEIGHT_COPIES = KEPT_EPOCHS + 1  # copies of the weights: at the newest epochs' ends, and one on its way to a worker
STATE_COPIES = 3  # copies of a state while it is saved: its arrays, their bytes, and the content of the file
FLOAT32 = 4  # bytes of a value


def server_memory(spec: JobSpec, size: int, workers: int, connected: int = 0) -> int:
    """Estimate the peak memory of a server in bytes: while it saves, with kept weights of past epochs.

    Args:
        spec: the job to train.
        size: number of values of the server's partition.
        workers: number of workers that push.
        connected: number of them whose lane (tcp or ray) copies the vectors into messages.
    """
    parts = _parts(spec, workers)
    messages = 2 if spec.correction.reads_weights else 1  # vectors of one push
    vectors = (
        sum(part.held for part in parts)
        + STATE_COPIES * sum(part.saved for part in parts)
        + WEIGHT_COPIES
        + connected * (spec.scaling.pipeline + 1) * messages
    )
    return FLOAT32 * size * vectors


def _parts(spec: JobSpec, workers: int) -> list[Vectors]:
    """Return the vectors of each part that lives as long as the server."""
    optimizer = spec.optimizer
    # Parts of size 0 take no memory; they are built only to be asked.
    correction = build_correction(spec, 0)
    aggregator = build_consistency(spec.consistency).aggregator(0, 0)
    elementwise = correction.elementwise or optimizer.clip_value is not None
    copies = workers if aggregator.keeps else 1  # number of decoded or corrected gradients at the same time
    return [
        Vectors(1, 1),  # the weights
        Vectors(1 if correction.shifts else 0),  # shifted weights that workers pull
        Vectors(1, 1) if optimizer.ema is not None else Vectors(0),
        Vectors(copies if elementwise else 0),
        Vectors(0) if spec.compression.name == "none" else Vectors(copies + 1 if aggregator.keeps else 1),
        build_optimizer(optimizer, 0).vectors(),
        correction.vectors(workers),
        aggregator.vectors(workers, scaled=optimizer.max_grad_norm is not None and not elementwise),
    ]
