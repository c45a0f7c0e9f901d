"""How much memory a server needs, from the job alone: each part of a server states how many vectors it keeps."""

from __future__ import annotations

from psgd.core.server.consistency import build_consistency
from psgd.core.server.corrections import build_correction
from psgd.core.server.optimizers import build_optimizer
from psgd.core.server.parameter_server import KEPT_EPOCHS
from psgd.core.server.state import Vectors
from psgd.spec import JobSpec

__all__ = ["FLOAT32", "server_memory"]

EVALUATED = KEPT_EPOCHS + 1  # copies of weights: those of the newest epochs' ends, and one on its way to a worker
SAVING = 3  # copies of a state while it is saved: its arrays, their bytes, and the file's content
FLOAT32 = 4  # bytes of a value


def server_memory(spec: JobSpec, size: int, workers: int, connected: int = 0) -> int:
    """Estimate the bytes that a server holds at most: while it saves, with weights of past epochs to evaluate.

    Args:
        spec: the job.
        size: values of the server's partition.
        workers: how many workers push.
        connected: of these, how many reach the server by a lane whose messages carry the vectors.
    """
    parts = _parts(spec, workers)
    messages = 2 if spec.correction.reads_weights else 1  # vectors of one push
    vectors = (
        sum(part.held for part in parts)
        + SAVING * sum(part.saved for part in parts)
        + EVALUATED
        + connected * (spec.scaling.pipeline + 1) * messages
    )
    return FLOAT32 * size * vectors


def _parts(spec: JobSpec, workers: int) -> list[Vectors]:
    """Everything that lives as long as the server. Parts that are built for an empty slice take no memory."""
    optimizer = spec.optimizer
    correction = build_correction(spec, 0)
    aggregator = build_consistency(spec.consistency).aggregator(0, 0)
    elementwise = correction.elementwise or optimizer.clip_value is not None
    copies = workers if aggregator.keeps else 1  # of gradients that are changed before they enter a round
    return [
        Vectors(1, 1),  # the weights
        Vectors(1 if correction.shifts else 0),  # other weights that workers are shown
        Vectors(1, 1) if optimizer.ema is not None else Vectors(0),
        Vectors(copies if elementwise else 0),
        Vectors(0) if spec.compression.name == "none" else Vectors(copies + 1 if aggregator.keeps else 1),
        build_optimizer(optimizer, 0).vectors(),
        correction.vectors(workers),
        aggregator.vectors(workers, scaled=optimizer.max_grad_norm is not None and not elementwise),
    ]
