"""The lane: the port by which a worker reaches one server. Each transport implements it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

from psgd_workers.messages import Gradient, Receipt, Version
from psgd_workers.transport.memory import Segment

__all__ = ["Connect", "Lane", "LaneKind", "Pending"]

LaneKind = Literal["shm", "tcp", "ray"]


class Pending(Protocol):
    """A push that was sent and has no receipt yet."""

    def receipt(self, timeout_s: float) -> Receipt:
        """Wait for the receipt. A consistency mode makes a worker wait here and nowhere else.

        If the push wanted weights, they are in its slot when this returns, and the receipt's version is the version of
        these weights: that of the step that contains the push, or a later one.

        Args:
            timeout_s: longest wait, in seconds.

        Raises:
            LaneTimeoutError: no receipt came within the limit. The push may have been applied or not.
            LaneError: the lane failed for another reason. The push may have been applied or not.
        """


class Lane(Protocol):
    """A worker's way to one partition: it sends gradients from the slots of a segment and writes weights into them.

    After a method has raised a `LaneError`, only `hang_up` and `close` may be called.
    """

    kind: LaneKind

    def pull(self, slot: int, timeout_s: float) -> Version:
        """Copy the partition's published weights into a slot. A consistency mode never delays this.

        Args:
            slot: number of the slot whose weights are overwritten, in the partition's slice.
            timeout_s: longest wait, in seconds.

        Returns:
            The version of the copied weights; they are never a mixture of two versions.

        Raises:
            LaneError: the lane failed; see `Pending.receipt`.
        """

    def version(self, timeout_s: float) -> Version:
        """Return the partition's version now, without its weights.

        Raises:
            LaneError: the lane failed; see `Pending.receipt`.
        """

    def push(self, gradient: Gradient, slot: int, wants: bool) -> Pending:
        """Begin to send a gradient and return without waiting, so that pushes to several partitions overlap.

        Args:
            gradient: the push. Its vectors are views of the slot, or encoded; the caller must not change them before
                the receipt.
            slot: number of the slot in which the gradient was computed.
            wants: True if the new weights are to come with the receipt.

        Raises:
            LaneError: the lane failed; see `Pending.receipt`.
        """

    def hang_up(self) -> None:
        """End the calls under way in other threads with a `LaneError`: the server is known to be gone."""

    def close(self) -> None:
        """Close the lane. A push without a receipt may have been applied or not."""


Connect = Callable[[Segment], Lane]  # opens a lane; raises LaneError if the lane does not work here
