"""Placement: the choice of the node that a server is started on.

Ray's own strategy SPREAD does not spread servers. Each node counts only the actors that it placed itself, and a server
needs no CPU, so no node is ever full: two servers may share a node while another node has none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import ray

from psgd.errors import ClusterLostError

__all__ = ["choose_node", "living_nodes"]


def living_nodes() -> list[str]:
    """Return Ray's ids of the nodes that are up, as far as Ray knows."""
    list_nodes: Any = ray.nodes  # Ray's stub is untyped
    return [str(node["NodeID"]) for node in list_nodes() if node["Alive"]]


def choose_node(nodes: Sequence[str], others: Collection[str], lost: Mapping[str, int]) -> str:
    """Return the node on which the fewest servers were lost, and among equals the node with the fewest servers.

    A server that has a node to itself also has the node's network link and memory to itself.

    Args:
        nodes: Ray's ids of the nodes that are up.
        others: ids of the nodes of the run's other servers, one entry per server.
        lost: number of servers lost so far, by node id. It matters because Ray may still count a node as up when the
            node has failed together with its server.

    Raises:
        ClusterLostError: no node is up.
    """
    if not nodes:
        raise ClusterLostError(
            "the cluster is gone: Ray knows no node that is up. The same command with --resume continues the run on "
            "another cluster"
        )
    servers = Counter(others)
    return min(nodes, key=lambda node: (lost.get(node, 0), servers[node]))
