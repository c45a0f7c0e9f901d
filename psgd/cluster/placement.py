"""Placement: the node that a server is started on.

Ray's own strategy SPREAD does not do: each node that is asked counts for itself, and servers need no CPU that could run
out, so that two of them may well land on one node and leave others empty.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import ray

from psgd.errors import ClusterLostError

__all__ = ["choose_node", "living_nodes"]


def living_nodes() -> list[str]:
    """Ray's ids of the nodes that are up, as far as it knows."""
    members: Any = ray.nodes  # its stub is untyped
    return [str(node["NodeID"]) for node in members() if node["Alive"]]


def choose_node(nodes: Sequence[str], others: Collection[str], lost: Mapping[str, int]) -> str:
    """One where the fewest servers were lost, and of those the one that has fewest, a link and a memory of its own.

    Args:
        nodes: that are up.
        others: where the run's other servers are.
        lost: how many servers were lost on a node; Ray may not know yet that it is gone with them.

    Raises:
        ClusterLostError: no node is up.
    """
    if not nodes:
        raise ClusterLostError(
            "the cluster is gone: Ray knows no node that is up. The same command with --resume continues on another"
        )
    servers = Counter(others)
    return min(nodes, key=lambda node: (lost.get(node, 0), servers[node]))
