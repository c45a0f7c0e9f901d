"""The lane: how a worker reaches one server. A port of few verbs; every transport is an implementation of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

from psgd_workers.messages import Gradient, Receipt, Version
from psgd_workers.transport.memory import Segment

__all__ = ["Connect", "Lane", "LaneKind", "Pending"]

LaneKind = Literal["shm", "tcp", "ray"]


class Pending(Protocol):
    """A push under way."""

    def receipt(self, timeout_s: float) -> Receipt:
        """Wait for the receipt: the only place where a consistency mode makes a worker wait.

        If the push wanted weights, its slot holds them now, and the receipt's version is theirs: that of the step which
        it tells of, or a later one.

        Raises:
            LaneTimeoutError: no receipt came within the limit. The push may have been applied or not.
            LaneError: the lane failed for another reason. The push may have been applied or not.
        """


class Lane(Protocol):
    """One worker's way to one partition, from a segment's slots and back into them.

    After an error it is not used again.
    """

    kind: LaneKind

    def pull(self, slot: int, timeout_s: float) -> Version:
        """Copy the partition's published weights into its part of a slot's weights; never waits for a mode.

        Returns:
            The version that was read, never a mixture of two.
        """

    def version(self, timeout_s: float) -> Version:
        """The partition's version now, without its weights."""

    def push(self, gradient: Gradient, slot: int, wants: bool) -> Pending:
        """Send a gradient; returns at once, so that pushes to several partitions overlap.

        Args:
            gradient: its vectors are the slot's, or encoded; all of them stay as they are until the receipt.
            slot: what it was computed in.
            wants: whether the weights are to come with the receipt.
        """

    def hang_up(self) -> None:
        """Wait no more for a server that is gone without a word; calls under way in other threads end in an error."""

    def close(self) -> None:
        """Let go of the server; pushes under way are in doubt."""


Connect = Callable[[Segment], Lane]  # raises LaneError: this lane does not work here
