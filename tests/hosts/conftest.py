"""A Ray cluster on three hosts that are network namespaces."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.namespaces import network, unavailable_reason
from tests.support.nodes import Nodes

UNAVAILABLE = unavailable_reason()


@pytest.fixture(scope="module")
def cluster(ray_home: Path, environment: dict[str, str]) -> Iterator[Nodes]:
    """Yield Ray on three hosts of one CPU each; skip where namespaces cannot be used."""
    if UNAVAILABLE is not None:
        pytest.skip(UNAVAILABLE)
    with network(3) as hosts:
        nodes = Nodes(hosts, (1, 1, 1), ray_home, environment)
        nodes.start(hosts)
        yield nodes


@pytest.fixture
def nodes(cluster: Nodes) -> Nodes:
    """Return the cluster, with every host and cable repaired."""
    cluster.repair()
    return cluster
