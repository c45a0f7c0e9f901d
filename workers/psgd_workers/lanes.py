"""The lane: how a worker reaches one server. A port of three verbs; every transport is an implementation of it."""

from __future__ import annotations

from typing import Protocol

from psgd_workers.messages import FloatArray, Gradient, Receipt, Version

__all__ = ["Lane", "Pending"]


class Pending(Protocol):
    """A push under way."""

    def receipt(self, timeout_s: float) -> Receipt:
        """Wait for the receipt: the only place where a consistency mode makes a worker wait.

        Raises:
            LaneTimeoutError: none came within the limit. Whether the push was applied is in doubt.
            LaneError: the server is gone. Likewise.
        """


class Lane(Protocol):
    """One worker's way to one partition."""

    def pull(self, into: FloatArray, timeout_s: float) -> Version:
        """Copy the partition's published weights; never waits for a mode.

        Args:
            into: `[partition size]`, overwritten.
            timeout_s: seconds the server may take.

        Returns:
            The version that was read, never a mixture of two.
        """

    def version(self, timeout_s: float) -> Version:
        """The partition's version now, without its weights."""

    def push(self, gradient: Gradient, into: FloatArray | None) -> Pending:
        """Send a gradient; returns at once, so that pushes to several partitions overlap.

        Args:
            gradient: its values may be overwritten as soon as this returns.
            into: `[partition size]`; when the receipt comes, it holds the weights of the receipt's version, as if
                pulled that instant. None: the worker does not go on, and wants none.
        """
