from __future__ import annotations

import pytest

from psgd.cluster.placement import choose_node
from psgd.errors import ClusterLostError


def test_servers_are_spread_as_evenly_as_nodes_allow() -> None:
    nodes = ["a", "b", "c"]
    chosen = list[str]()
    for _ in range(7):
        chosen.append(choose_node(nodes, chosen, {}))
    assert chosen == ["a", "b", "c", "a", "b", "c", "a"]


@pytest.mark.parametrize(
    ("others", "expected"),
    [([], "b"), (["b"], "c"), (["b", "c"], "b")],
    ids=["no other server", "a free one", "rather a shared one than the lost one"],
)
def test_a_server_is_not_restored_where_it_was_lost(others: list[str], expected: str) -> None:
    assert choose_node(["a", "b", "c"], others, {"a": 1}) == expected


def test_the_only_node_is_taken_again() -> None:
    assert choose_node(["a"], [], {"a": 3}) == "a"


def test_a_node_that_lost_one_after_another_is_not_forgotten_for_the_newest() -> None:
    assert choose_node(["a", "b", "c"], ["c"], {"a": 1, "b": 1}) == "c"
    assert choose_node(["a", "b"], ["b"], {"a": 2, "b": 1}) == "b"


def test_where_no_node_is_up_the_cluster_is_lost() -> None:
    with pytest.raises(ClusterLostError, match="no node that is up"):
        choose_node([], ["a"], {"a": 1})
