"""Refusals of combinations of modes, corrections, optimizers, workers and servers that make no sense."""

from __future__ import annotations

from collections.abc import Iterator

from psgd.spec.consistency import (
    BackupConsistency,
    ConsistencySpec,
    KSyncConsistency,
    LocalConsistency,
    RingleaderConsistency,
    SoftsyncConsistency,
)
from psgd.spec.correction import (
    CorrectionSpec,
    DanaCorrection,
    NoCorrection,
    RescaledCorrection,
)
from psgd.spec.optimizer import OptimizerSpec, SgdOptimizer
from psgd.spec.scaling import ScalingConfig
from psgd_workers.counting import counted

__all__ = ["faults"]


def faults(
    consistency: ConsistencySpec, correction: CorrectionSpec, optimizer: OptimizerSpec, scaling: ScalingConfig
) -> list[str]:
    """Return a sentence for each fault of a combination, with the values given, the reason and the remedy."""
    found = [
        *_too_few_workers(consistency, scaling.least_workers),
        *_useless_correction(consistency, correction),
        *_conflicts_with_scaling(consistency, scaling),
    ]
    if isinstance(correction, DanaCorrection) and not (isinstance(optimizer, SgdOptimizer) and optimizer.momentum == 0):
        found.append(
            "correction dana keeps its own momentum: use optimizer sgd with momentum 0, and set correction.momentum"
        )
    return found


def _too_few_workers(consistency: ConsistencySpec, workers: int) -> Iterator[str]:
    have = counted(workers, "worker")
    match consistency:
        case KSyncConsistency(k=k) if k > workers:
            yield f"consistency.k is {k}, but the job has {have}: lower k, or raise scaling.workers"
        case BackupConsistency(b=b) if b >= workers:
            yield (
                f"consistency.b is {b}, but the job has {have}, and at least one must be left: lower b, or raise "
                "scaling.workers"
            )
        case SoftsyncConsistency(s=s) if s > workers:
            yield (
                f"consistency.s is {s}, but the job has {have}, and s can be at most that: lower s, or raise "
                "scaling.workers"
            )


def _useless_correction(consistency: ConsistencySpec, correction: CorrectionSpec) -> Iterator[str]:
    if isinstance(correction, NoCorrection):
        return
    name = correction.name
    mode = consistency.mode
    if consistency.traits.fresh_only:
        yield f"correction {name} does nothing in mode {mode}, where no gradient is stale: drop it, or use mode async"
    elif isinstance(consistency, RingleaderConsistency):
        yield f"correction {name} does not fit mode ringleader, which weights all workers equally already: drop it"
    elif isinstance(consistency, LocalConsistency) and (
        correction.reads_weights or isinstance(correction, DanaCorrection)
    ):
        yield f"correction {name} is made for gradients, but mode local pushes sums of steps: use staleness_lr, or none"
    elif consistency.traits.mixes_staleness and isinstance(correction, DanaCorrection | RescaledCorrection):
        yield f"correction {name} needs one gradient per step, but mode {mode} averages several: use mode async"


def _conflicts_with_scaling(consistency: ConsistencySpec, scaling: ScalingConfig) -> Iterator[str]:
    mode = consistency.mode
    traits = consistency.traits
    if scaling.servers > 1 and traits.chooses_gradients:
        yield (
            f"scaling.servers is {scaling.servers}, but mode {mode} chooses which gradients form a step, and each "
            "server would choose differently: set scaling.servers to 1, or use mode async or bsp"
        )
    if scaling.pipeline and (traits.chooses_gradients or traits.workers_wait):
        why = "chooses which gradients form a step" if traits.chooses_gradients else "makes workers wait for each other"
        yield (
            f"scaling.pipeline is {scaling.pipeline}, but mode {mode} {why}, and a worker that computes batches ahead "
            "defeats that: set scaling.pipeline to 0, or use mode async"
        )
