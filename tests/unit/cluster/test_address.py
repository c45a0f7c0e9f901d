from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from psgd.cluster import address as address_module
from psgd.cluster.address import find_address
from psgd.errors import ClusterError

SETTINGS_FRAME = b"\0\0\x18\4\0\0\0\0\0\0\4\0@\0\0\0\5\0@\0\0"  # sent by Ray's head on every connection


@contextmanager
def answering(greeting: bytes, answer: bytes, family: socket.AddressFamily = socket.AF_INET) -> Iterator[int]:
    """Listen on a free port. The second connection gets a greeting, and an answer to the first bytes that it sends.

    Yields:
        The port.
    """

    def serve() -> None:
        listener.accept()[0].close()  # the check that anything listens
        with listener.accept()[0] as connection:
            connection.settimeout(10)
            connection.sendall(greeting)
            connection.recv(1000)
            connection.sendall(answer)

    with (
        socket.create_server(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0), family=family) as listener,
        ThreadPoolExecutor(1) as pool,
    ):
        listener.settimeout(10)
        served = pool.submit(serve)
        yield listener.getsockname()[1]
        served.result(10)


@pytest.mark.parametrize(
    ("given", "variable", "found"),
    [
        (None, None, None),
        (None, "", None),
        ("", "", None),
        (None, "local", None),
        ("local", "10.0.0.1:6379", None),
        (None, "auto", "auto"),
        ("auto", "local", "auto"),
    ],
)
def test_without_an_address_ray_starts_a_cluster(
    monkeypatch: pytest.MonkeyPatch, given: str | None, variable: str | None, found: str | None
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert find_address(given) == found


@pytest.mark.parametrize(
    ("host", "family"), [("127.0.0.1", socket.AF_INET), ("[::1]", socket.AF_INET6), ("localhost", socket.AF_INET)]
)
def test_a_head_is_connected_to(host: str, family: socket.AddressFamily) -> None:
    with answering(SETTINGS_FRAME, b"", family) as port:
        assert find_address(f"{host}:{port}") == f"{host}:{port}"


def test_a_dashboards_port_is_recognised() -> None:
    with (
        answering(b"", b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n") as port,
        pytest.raises(ClusterError, match=rf"HTTP server answers.*psgd submit .* http://127\.0\.0\.1:{port}$"),
    ):
        find_address(f"127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("answer", "given"),
    [
        (b"-ERR unknown command\r\n", r"it sent b'-ERR unknown"),  # Redis
        (b"SSH-2.0-OpenSSH_9.2\r\n", r"it sent b'SSH-2\.0"),
        (b"", r"it sent nothing within 0\.1 s"),
    ],
)
def test_another_program_at_the_port_is_refused_because_ray_would_wait_for_it_for_ever(
    monkeypatch: pytest.MonkeyPatch, answer: bytes, given: str
) -> None:
    monkeypatch.setattr(address_module, "ANSWER_TIMEOUT_S", 0.1)
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    with (
        answering(b"", answer) as port,
        pytest.raises(ClusterError, match=f"the process there is not Ray's head: {given}"),
    ):
        find_address(f"127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://head:8265", r"is the URL of a dashboard.*psgd submit JOB\.yaml --address http://head:8265\."),
        ("https://head", "is the URL of a dashboard"),
        ("ray://head:10001", "is a Ray Client address"),
        ("head", "expected HOST:PORT"),
        ("head:", "expected HOST:PORT"),
        (":6379", "expected HOST:PORT"),
        ("head:port", "expected HOST:PORT"),
        ("head:70000", "expected HOST:PORT"),
        ("::1:6379", r"expected HOST:PORT .* \[fd00::1\]:6379"),
        ("[::1:6379", "expected HOST:PORT"),
        ("me@head:6379", "expected HOST:PORT"),
        ("head:6379/path", "expected HOST:PORT"),
    ],
)
@pytest.mark.parametrize("name", ["--address", "RAY_ADDRESS"])
def test_other_addresses_are_refused_by_their_name(
    monkeypatch: pytest.MonkeyPatch, name: str, address: str, message: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ClusterError, match=message) as refused:
        find_address(address if name == "--address" else None)
    assert str(refused.value).startswith(f"{name} {address!r}")


def test_where_nothing_listens_nothing_is_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(ClusterError, match=f"nothing answers at 127.0.0.1:{port}"):
        find_address(f"127.0.0.1:{port}")
