"""Consistency: which gradients are admitted, and when a round of them becomes a step.

A *round* is what one step is made of. The server collects pushes into it; the mode says when it closes; then the mean
of its gradients is one step, and every worker heard in it gets its receipt. Receipts are the only thing that makes a
worker wait, so the mode decides everything about waiting by deciding when rounds close.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import Protocol

from psgd.spec import AsyncConsistency, BspConsistency
from psgd_workers.messages import Gradient, Version

__all__ = ["Async", "Bsp", "Consistency", "build_consistency"]


class Consistency(Protocol):
    """One mode."""

    def admits(self, gradient: Gradient, version: Version) -> bool:
        """Whether a gradient that was read in this server's history may enter the round; else it is requeued."""

    def closes(self, heard: AbstractSet[str], live: AbstractSet[str], outstanding: bool) -> bool:
        """Whether the round closes now.

        Args:
            heard: the workers that pushed since the last step, whatever became of their pushes.
            live: the workers that hold a lease.
            outstanding: whether some batch of the epoch is in no state yet.
        """


class Async:
    """w ← w - η·g on every push (Downpour SGD; Dean et al., 2012)."""

    def admits(self, gradient: Gradient, version: Version) -> bool:
        """Any staleness."""
        del gradient, version
        return True

    def closes(self, heard: AbstractSet[str], live: AbstractSet[str], outstanding: bool) -> bool:
        """At once."""
        del live, outstanding
        return bool(heard)


class Bsp:
    """w ← w - η·mean of one gradient of each live worker, all computed from the same version.

    At an epoch's end the last round closes with what is left.
    """

    def admits(self, gradient: Gradient, version: Version) -> bool:
        """Only what was computed from the weights that the step starts from."""
        return gradient.read == version

    def closes(self, heard: AbstractSet[str], live: AbstractSet[str], outstanding: bool) -> bool:
        """When every live worker was heard, or nobody has a batch left to push."""
        return bool(heard) and (live <= heard or not outstanding)


def build_consistency(spec: AsyncConsistency | BspConsistency) -> Consistency:
    """The mode that a job asks for."""
    return Bsp() if isinstance(spec, BspConsistency) else Async()
