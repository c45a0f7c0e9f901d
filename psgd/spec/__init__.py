"""A job, as plain frozen values: one module per section, composed by `JobSpec`."""

from psgd.spec.consistency import AsyncConsistency, BspConsistency, ConsistencySpec
from psgd.spec.job import CheckpointConfig, FailureConfig, JobSpec, RunConfig, ScalingConfig, TargetConfig
from psgd.spec.optimizer import OptimizerSpec, SgdOptimizer

__all__ = [
    "AsyncConsistency",
    "BspConsistency",
    "CheckpointConfig",
    "ConsistencySpec",
    "FailureConfig",
    "JobSpec",
    "OptimizerSpec",
    "RunConfig",
    "ScalingConfig",
    "SgdOptimizer",
    "TargetConfig",
]
