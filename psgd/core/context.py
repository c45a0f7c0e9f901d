"""RunContext: the values that every actor of a run is started with."""

from __future__ import annotations

from dataclasses import dataclass

from psgd.core.server.partitions import Partition
from psgd.spec import JobSpec
from psgd_workers.gradients.layout import Layout
from psgd_workers.messages import EpochGrid

__all__ = ["RunContext"]


@dataclass(frozen=True, slots=True)
class RunContext:
    """Values that stay the same for a whole run of one driver and are sent to all its servers and workers."""

    spec: JobSpec
    layout: Layout  # slices and shapes of the tensors in the flat weights
    grid: EpochGrid  # number of batches in each shard, and of examples in an epoch
    partitions: tuple[Partition, ...]  # one for each server
    driver: str  # id of the driver that owns the run
    storage: str  # URL of the run directory
