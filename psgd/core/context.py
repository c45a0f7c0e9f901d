"""The facts of a run, which its actors are started with."""

from __future__ import annotations

from dataclasses import dataclass

from psgd.core.server.partitions import Partition
from psgd.spec import JobSpec
from psgd_workers.gradients.layout import Layout
from psgd_workers.messages import EpochGrid

__all__ = ["RunContext"]


@dataclass(frozen=True, slots=True)
class RunContext:
    """What every actor of a run is told."""

    spec: JobSpec
    layout: Layout
    grid: EpochGrid
    partitions: tuple[Partition, ...]
    driver: str  # id of the run's owner
    storage: str  # URL of the run directory
