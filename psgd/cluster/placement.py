"""Placement: the node that a server is started on.

Ray's own strategy SPREAD does not do: each node that is asked counts for itself, and servers need no CPU that could run
out, so that two of them may well land on one node and leave others empty.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import ray

__all__ = ["choose_node", "living_nodes"]


def living_nodes() -> list[str]:
    """Ray's ids of the nodes that are up, as far as it knows."""
    members: Any = ray.nodes  # its stub is untyped
    return [str(node["NodeID"]) for node in members() if node["Alive"]]


def choose_node(nodes: Sequence[str], others: Collection[str], before: str | None) -> str:
    """One that has fewest servers, so that each has a link and a memory of its own.

    Args:
        nodes: that are up.
        others: where the run's other servers are.
        before: where this server's predecessor was lost; Ray may not know yet that the node is gone with it.
    """
    servers = Counter(others)
    return min(nodes, key=lambda node: (node == before, servers[node]))
