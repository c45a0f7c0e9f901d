"""The probe: a check that the raylet of the driver's node and the head of the cluster still run.

Ray ends a driver about 15 seconds after its raylet is gone, and 60 seconds after the head is gone. The driver exits
with code 1 and cannot write anything more. But the port of a process refuses connections as soon as the process has
ended. The probe notices this, so the driver still has time to write how far the run got.
"""

from __future__ import annotations

import socket
from math import inf
from typing import Any
from urllib.parse import urlsplit

import ray

from psgd.errors import ClusterLostError

__all__ = ["ClusterProbe"]

CHECK_INTERVAL_S = 0.5
CONNECT_TIMEOUT_S = 0.2  # short, as the supervisor waits for it; a timeout does not count as a loss
HEAD_GRACE_S = 45.0  # Ray reconnects to a head that returns within 60 s; the last 15 s are for writing the result

Address = tuple[str, int]


class ClusterProbe:
    """A test connection to the ports of the driver's raylet and of the cluster's head.

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
    def for_connection(cls) -> ClusterProbe:
        """Return the probe of the cluster that this process is connected to."""
        context: Any = ray.get_runtime_context()  # Ray's stubs are untyped
        nodes: Any = ray.nodes
        (my_node,) = (node for node in nodes() if node["NodeID"] == context.get_node_id())
        head = urlsplit(f"//{context.gcs_address}")
        return cls((my_node["NodeManagerAddress"], my_node["NodeManagerPort"]), (str(head.hostname), head.port or 0))

    def check(self, now: float) -> None:
        """Raise an error if the cluster is gone. The ports are tried once every `CHECK_INTERVAL_S`.

        Args:
            now: monotonic time, seconds.

        Raises:
            ClusterLostError: the raylet is gone, or the head has been gone for `HEAD_GRACE_S`.
        """
        if now < self._next_at:
            return
        self._next_at = now + CHECK_INTERVAL_S
        if _refuses(self._raylet):
            raise ClusterLostError(_loss_message("the raylet of this node", self._raylet))
        if not _refuses(self._head):
            self._head_gone_at = None
        elif self._head_gone_at is None:
            self._head_gone_at = now
        elif now - self._head_gone_at >= HEAD_GRACE_S:
            raise ClusterLostError(_loss_message("its head", self._head))


def _loss_message(process: str, address: Address) -> str:
    return (
        f"the cluster is gone: {process}, {address[0]}:{address[1]}, has ended. Ray's logs may say why. The same "
        "command with --resume continues the run on another cluster"
    )


def _refuses(address: Address) -> bool:
    """Return True if no process listens there. A timeout or another error of the operating system does not count."""
    try:
        socket.create_connection(address, CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return isinstance(error, ConnectionRefusedError)
    return False
