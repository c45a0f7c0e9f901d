"""The rule of a server: what a job says about a push, as one record that compiled code reads."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psgd.core.server.parameter_server import ParameterServer
from psgd.spec import (
    AdagradOptimizer,
    AdamOptimizer,
    AdamwOptimizer,
    ConstantSchedule,
    CosineSchedule,
    DelayAdaptiveCorrection,
    DelayedNesterovOptimizer,
    JobSpec,
    RescaledCorrection,
    RingmasterConsistency,
    SgdOptimizer,
    StalenessLrCorrection,
    StepSchedule,
)
from psgd_workers.messages import EpochGrid

__all__ = [
    "ADAGRAD",
    "ADAM",
    "CONSTANT",
    "COSINE",
    "DELAYED_NESTEROV",
    "DELAY_ADAPTIVE",
    "MOMENTUM",
    "NO_CORRECTION",
    "RESCALED",
    "RULE",
    "SGD",
    "STALENESS_LR",
    "STEP",
    "Grid",
    "epoch_grid",
    "write_rule",
]

SGD, MOMENTUM, ADAGRAD, ADAM, DELAYED_NESTEROV = range(5)
CONSTANT, STEP, COSINE = range(3)
NO_CORRECTION, STALENESS_LR, DELAY_ADAPTIVE, RESCALED = range(4)

RULE = np.dtype(
    [
        ("applies", "<i8"),  # 1 if compiled code may apply pushes under the present settings, else 0
        ("trained", "<i8"),  # values of the partition before the first buffer
        ("partitions", "<i8"),
        ("stale", "<i8"),  # lowest staleness that is not admitted
        # Optimizer
        ("optimizer", "<i8"),
        ("nesterov", "<i8"),
        ("decays", "<i8"),  # 0: no weight decay; 1: before the rule; 2: after it
        ("dampens", "<i8"),
        ("momentum", "<f4"),
        ("gradient_factor", "<f4"),
        ("decay", "<f4"),
        ("eps", "<f4"),
        ("mean_kept", "<f4"),
        ("mean_added", "<f4"),
        ("square_kept", "<f4"),
        ("square_added", "<f4"),
        ("mean_beta", "<f8"),
        ("square_beta", "<f8"),
        ("every", "<i8"),
        ("ema", "<f8"),  # nan: no average
        # Clipping; inf: no limit
        ("max_norm", "<f8"),
        ("clip_value", "<f8"),
        # Learning rate
        ("lr", "<f8"),
        ("schedule", "<i8"),
        ("ramp", "<f8"),  # examples of the warm-up
        ("step_examples", "<f8"),
        ("step_factor", "<f8"),
        ("cosine_examples", "<f8"),
        ("cosine_final", "<f8"),
        ("correction", "<i8"),
        ("workers", "<i8"),
    ]
)

Rule = NDArray[np.void]
Grid = NDArray[np.int64]


def epoch_grid(grid: EpochGrid) -> Grid:
    """Return the grid of the batches as an array.

    Returns:
        `[shards, 4]`, int64. For each shard: position of its first batch, number of batches, number of examples in each
        batch but the last, and number of examples.
    """
    rows = []
    for shard, batches in enumerate(grid.batches_per_shard):
        if grid.examples_per_shard:
            sizes = [grid.batch_size, grid.examples_per_shard[shard]]
        else:
            each = grid.num_examples // grid.num_batches
            sizes = [each, each * batches]
        rows.append([grid.shard_start(shard), batches, *sizes])
    return np.array(rows, np.int64)


def write_rule(rule: Rule, server: ParameterServer) -> None:
    """Write the present settings of a server into a rule.

    Args:
        rule: `[1]`, of dtype RULE; overwritten.
        server: the server.
    """
    spec = server.spec
    settings = server.settings
    optimizer = settings.optimizer
    grid = server.grid
    fields: dict[str, Any] = {
        "applies": server.steps_alone,
        "trained": server.partition.num_trainable,
        "partitions": spec.scaling.servers,
        "stale": settings.consistency.r if isinstance(settings.consistency, RingmasterConsistency) else 1 << 62,
        "ema": nan if spec.optimizer.ema is None else spec.optimizer.ema,
        "max_norm": inf if optimizer.max_grad_norm is None else optimizer.max_grad_norm,
        "clip_value": inf if optimizer.clip_value is None else optimizer.clip_value,
        "lr": optimizer.lr,
        "workers": spec.scaling.most_workers,
        **_optimizer_fields(spec),
        **_schedule_fields(optimizer.schedule, grid.num_examples),
        "correction": _CORRECTIONS.get(type(spec.correction), NO_CORRECTION),
    }
    for name in RULE.names or ():
        rule[name] = fields.get(name, 0)


def _optimizer_fields(spec: JobSpec) -> dict[str, Any]:
    match spec.optimizer:
        case SgdOptimizer(momentum=momentum, dampening=dampening, nesterov=nesterov, weight_decay=decay):
            return {
                "optimizer": MOMENTUM if momentum else SGD,
                "momentum": momentum,
                "dampens": dampening > 0,
                "gradient_factor": 1 - dampening,
                "nesterov": nesterov,
                "decay": decay,
                "decays": decay > 0,
            }
        case AdagradOptimizer(eps=eps, weight_decay=decay):
            return {"optimizer": ADAGRAD, "eps": eps, "decay": decay, "decays": decay > 0}
        case AdamOptimizer(eps=eps, weight_decay=decay) | AdamwOptimizer(eps=eps, weight_decay=decay):
            mean, square = spec.optimizer.betas
            decoupled = isinstance(spec.optimizer, AdamwOptimizer)
            return {
                "optimizer": ADAM,
                "eps": eps,
                "decay": decay,
                "decays": 0 if decay == 0 else 2 if decoupled else 1,
                "mean_beta": mean,
                "mean_kept": mean,
                "mean_added": 1 - mean,
                "square_beta": square,
                "square_kept": square,
                "square_added": 1 - square,
            }
        case DelayedNesterovOptimizer(momentum=momentum, every=every):
            return {"optimizer": DELAYED_NESTEROV, "momentum": momentum, "every": every}


def _schedule_fields(schedule: ConstantSchedule | StepSchedule | CosineSchedule, examples: int) -> dict[str, Any]:
    ramp = schedule.warmup * examples
    match schedule:
        case ConstantSchedule():
            return {"schedule": CONSTANT, "ramp": ramp}
        case StepSchedule(every=every, factor=factor):
            return {"schedule": STEP, "ramp": ramp, "step_examples": every * examples, "step_factor": factor}
        case CosineSchedule(epochs=epochs, final=final):
            return {"schedule": COSINE, "ramp": ramp, "cosine_examples": epochs * examples, "cosine_final": final}


_CORRECTIONS: dict[type[Any], int] = {
    StalenessLrCorrection: STALENESS_LR,
    DelayAdaptiveCorrection: DELAY_ADAPTIVE,
    RescaledCorrection: RESCALED,
}
