"""What a job says about how its workers wait for each other."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from psgd_workers.spec import Spec

__all__ = ["AsyncConsistency", "BspConsistency", "ConsistencySpec"]


class AsyncConsistency(Spec):
    """Every gradient is a step of its own, as soon as it arrives: fastest, at the price of staleness."""

    mode: Literal["async"] = "async"
    """Which mode."""


class BspConsistency(Spec):
    """Bulk synchronous: one step on the mean of one gradient of each live worker, weighted by examples."""

    mode: Literal["bsp"]
    """Which mode."""


ConsistencySpec = Annotated[AsyncConsistency | BspConsistency, Field(discriminator="mode")]
