"""Addresses of Ray clusters: parse one, and refuse it if a driver cannot connect to it.

Without these checks, Ray would wait 20 seconds if nothing listens at the port, and for ever if another program does.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from urllib.parse import urlsplit

from psgd.errors import ClusterError

__all__ = ["check_listening", "find_address"]

CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 10.0
FRAME_HEADER_SIZE = 9  # bytes of a frame's header in HTTP/2: length, type, flags, stream (RFC 9113, section 4.1)
SETTINGS = b"\x04"  # type of the frame that begins every connection of HTTP/2
NAMES_OF_RAY = ("auto", "local")  # addresses that Ray resolves itself


def find_address(given: str | None) -> str | None:
    """Return the address of the cluster to connect to, or None to start a local cluster.

    Args:
        given: HOST:PORT, `auto` or `local`. If it is empty or None, the environment variable `RAY_ADDRESS` is used;
            an empty variable counts as unset, as in Ray.

    Raises:
        ClusterError: the address is malformed, nothing listens there, or the process there is not Ray's head.
    """
    address = given or os.environ.get("RAY_ADDRESS") or "local"
    given_by = "--address" if given else "RAY_ADDRESS"
    if address in NAMES_OF_RAY:
        return None if address == "local" else address
    _check_scheme(given_by, address)
    host, port = _split_address(given_by, address)
    check_listening(host, port, address)
    _check_head(given_by, address, host, port)
    return address


def _check_scheme(given_by: str, address: str) -> None:
    if address.startswith("ray://"):
        raise ClusterError(
            f"{given_by} {address!r} is a Ray Client address, and Ray Client cannot carry a training run. Submit the "
            "job: psgd submit JOB.yaml --address http://HEAD:8265, or run the driver on the cluster"
        )
    if address.startswith(("http://", "https://")):
        raise ClusterError(
            f"{given_by} {address!r} is the URL of a dashboard. To run the driver on that cluster: "
            f"psgd submit JOB.yaml --address {address}. To run the driver on this machine, give HOST:PORT of the "
            "cluster's head, such as 10.0.0.1:6379"
        )


def _split_address(given_by: str, address: str) -> tuple[str, int]:
    """Split HOST:PORT into host and port. An IPv6 host stands in brackets."""
    try:
        parts = urlsplit(f"//{address}")
        host = parts.hostname
        port = parts.port
    except ValueError:
        host = port = None
    if not host or not port or parts.netloc != address or "@" in address:
        raise ClusterError(
            f"{given_by} {address!r}: expected HOST:PORT of a Ray head, such as 10.0.0.1:6379 or [fd00::1]:6379, or "
            "'auto'"
        )
    return host, port


def check_listening(host: str, port: int, address: str) -> None:
    """Raise an error unless a process listens at a host and port.

    Args:
        host: name or IP address of the host.
        port: TCP port.
        address: the address as the user gave it, for the error message.

    Raises:
        ClusterError: nothing listens there.
    """
    try:
        socket.create_connection((host, port), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(
            f"nothing answers at {address}: {error}. Check that Ray's head runs, and that host and port are right"
        ) from error


def _check_head(given_by: str, address: str, host: str, port: int) -> None:
    """Raise an error unless Ray's head answers, which sends HTTP/2's SETTINGS frame on every connection at once."""
    answer = _first_bytes(host, port)
    if answer.startswith(b"HTTP/"):
        raise ClusterError(
            f"{given_by} {address!r}: an HTTP server answers there, such as Ray's dashboard. A driver connects to the "
            "port of Ray's head instead (6379 by default). To run the driver on the cluster: "
            f"psgd submit JOB.yaml --address http://{address}"
        )
    if answer[3:4] != SETTINGS and not os.environ.get("RAY_USE_TLS"):
        given = f"it sent {answer[:20]!r}" if answer else f"it sent nothing within {ANSWER_TIMEOUT_S:g} s"
        raise ClusterError(
            f"{given_by} {address!r}: the process there is not Ray's head: {given}. Give the port of Ray's head, which "
            "is 6379 by default"
        )


def _first_bytes(host: str, port: int) -> bytes:
    """Send a plain HTTP request. Return the first bytes of the answer, which HTTP/1 and HTTP/2 begin differently."""
    answer = b""
    with suppress(OSError), socket.create_connection((host, port), CONNECT_TIMEOUT_S) as connection:
        connection.settimeout(ANSWER_TIMEOUT_S)
        connection.sendall(b"HEAD / HTTP/1.0\r\n\r\n")
        while len(answer) < FRAME_HEADER_SIZE and (more := connection.recv(100)):
            answer += more
    return answer
