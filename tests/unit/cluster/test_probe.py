from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from psgd.cluster.probe import ClusterProbe
from psgd.errors import ClusterLostError

Address = tuple[str, int]


@contextmanager
def listening(port: int = 0) -> Iterator[Address]:
    """Listen like a process of Ray, but accept no connection. Yield the address."""
    with socket.create_server(("127.0.0.1", port), backlog=100) as server:
        yield server.getsockname()[:2]


def closed() -> Address:
    """Return an address where nothing listens."""
    with listening() as address:
        return address


def test_a_cluster_that_listens_is_there() -> None:
    with listening() as raylet, listening() as head:
        probe = ClusterProbe(raylet, head)
        for now in range(0, 300, 10):
            probe.check(now)


def test_without_its_raylet_the_cluster_is_lost_at_once() -> None:
    raylet = closed()
    with listening() as head, pytest.raises(ClusterLostError, match=rf"raylet of this node, 127\.0\.0\.1:{raylet[1]}"):
        ClusterProbe(raylet, head).check(0.0)


def test_a_head_may_be_gone_for_less_than_ray_bears() -> None:
    head = closed()
    with listening() as raylet:
        probe = ClusterProbe(raylet, head)
        for now in (0.0, 44.0):
            probe.check(now)
        with listening(head[1]):
            probe.check(50.0)
        for now in (60.0, 104.0):
            probe.check(now)
        with pytest.raises(ClusterLostError, match=r"its head, .* --resume continues"):
            probe.check(105.0)


def test_what_is_busy_or_cannot_be_asked_is_not_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    faults: list[OSError] = [TimeoutError(), OSError(24, "Too many open files")]

    def refuse(address: Address, timeout_s: float) -> socket.socket:
        raise faults[0]

    monkeypatch.setattr(socket, "create_connection", refuse)
    probe = ClusterProbe(("127.0.0.1", 1), ("127.0.0.1", 2))
    while faults:
        probe.check(0.0)
        probe.check(100.0)
        faults.pop()


def test_it_connects_a_few_times_a_second_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening() as raylet, listening() as head:
        connected: list[Address] = []
        connect = socket.create_connection

        def counted(address: Address, timeout_s: float) -> socket.socket:
            connected.append(address)
            return connect(address, timeout_s)

        monkeypatch.setattr(socket, "create_connection", counted)
        probe = ClusterProbe(raylet, head)
        for tick in range(1000):
            probe.check(tick / 1000)
    assert connected == [raylet, head] * 2
