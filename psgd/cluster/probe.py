"""The probe: whether the two processes of Ray's are there without which Ray ends the driver.

Without its node's raylet a driver is ended as soon as Ray looks for an object of the driver's, within some 15 s, and
without the cluster's head after 60 s: at once, with exit code 1, and nothing written. Their ports are refused before
that, which leaves the time to write how far the run came.
"""

from __future__ import annotations

import socket
from math import inf
from typing import Any
from urllib.parse import urlsplit

import ray

from psgd.errors import ClusterLostError

__all__ = ["ClusterProbe"]

EVERY_S = 0.5
CONNECT_S = 0.2  # only a refusal counts, and the supervisor waits meanwhile
HEAD_S = 45.0  # a head that comes back within 60 s is connected to again; writing a result takes the rest

Address = tuple[str, int]


class ClusterProbe:
    """Connects to the ports of the driver's raylet and of the head.

    Args:
        raylet: address of the raylet on the driver's node.
        head: address of the cluster's head.
    """

    def __init__(self, raylet: Address, head: Address) -> None:
        self._raylet = raylet
        self._head = head
        self._head_gone_at: float | None = None
        self._next_at = -inf

    @classmethod
    def connected(cls) -> ClusterProbe:
        """Return the probe of the cluster that this process is connected to."""
        context: Any = ray.get_runtime_context()  # stubs are untyped
        nodes: Any = ray.nodes
        (mine,) = (node for node in nodes() if node["NodeID"] == context.get_node_id())
        head = urlsplit(f"//{context.gcs_address}")
        return cls((mine["NodeManagerAddress"], mine["NodeManagerPort"]), (str(head.hostname), head.port or 0))

    def check(self, now: float) -> None:
        """Make sure that the cluster is there, `EVERY_S` at the most.

        Raises:
            ClusterLostError: the raylet is gone, or the head for `HEAD_S`.
        """
        if now < self._next_at:
            return
        self._next_at = now + EVERY_S
        if _refuses(self._raylet):
            raise ClusterLostError(_lost("the raylet of this node", self._raylet))
        if not _refuses(self._head):
            self._head_gone_at = None
        elif self._head_gone_at is None:
            self._head_gone_at = now
        elif now - self._head_gone_at >= HEAD_S:
            raise ClusterLostError(_lost("its head", self._head))


def _lost(process: str, address: Address) -> str:
    return (
        f"the cluster is gone: {process}, {address[0]}:{address[1]}, has ended. Ray's logs may say why; the same "
        "command with --resume continues on another"
    )


def _refuses(address: Address) -> bool:
    """Return True if no process listens there; a process that is busy, or a full table of files, tells nothing."""
    try:
        socket.create_connection(address, CONNECT_S).close()
    except OSError as error:
        return isinstance(error, ConnectionRefusedError)
    return False
