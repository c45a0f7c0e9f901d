from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.namespaces import missing, network
from tests.support.nodes import Nodes

LACKING = missing()


@pytest.fixture(scope="module")
def cluster(ray_home: Path, environment: dict[str, str]) -> Iterator[Nodes]:
    if LACKING is not None:
        pytest.skip(LACKING)
    with network(3) as hosts:
        nodes = Nodes(hosts, (1, 1, 1), ray_home, environment)
        nodes.start(hosts)
        yield nodes


@pytest.fixture
def nodes(cluster: Nodes) -> Nodes:
    """The cluster, which is whole again before the next test."""
    cluster.mend()
    return cluster
