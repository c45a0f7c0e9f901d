"""Addresses of a running Ray: those that a driver can connect to, and those it can only wait for."""

from __future__ import annotations

import os
import socket
from http.client import HTTPConnection, HTTPException
from urllib.parse import urlsplit

from psgd.errors import ClusterError

__all__ = ["check_listening", "find_address"]

CONNECT_S = 10.0
FOUND_BY_RAY = ("auto", "local")


def find_address(given: str | None) -> str | None:
    """Return the address of the cluster to connect to; None if Ray is to start a local one.

    Ray itself waits 20 s for a port that is not its head's, and minutes for one that speaks HTTP.

    Args:
        given: HOST:PORT, `auto` or `local`; empty or None: `RAY_ADDRESS`. As for Ray, an empty one is unset.

    Raises:
        ClusterError: nothing listens there, or something else than Ray's head.
    """
    address = given or os.environ.get("RAY_ADDRESS") or "local"
    name = "--address" if given else "RAY_ADDRESS"
    if address in FOUND_BY_RAY:
        return None if address == "local" else address
    _check_scheme(name, address)
    host, port = _split(name, address)
    check_listening(host, port, address)
    if _speaks_http(host, port):
        raise ClusterError(
            f"{name} {address!r}: an HTTP server answers there, such as Ray's dashboard, and a driver connects to the "
            "head's own port (6379 by default). To run the driver on the cluster instead: "
            f"psgd submit JOB.yaml --address http://{address}"
        )
    return address


def _check_scheme(name: str, address: str) -> None:
    if address.startswith("ray://"):
        raise ClusterError(
            f"{name} {address!r} is a Ray Client address, which cannot carry a training run. Submit the job instead: "
            "psgd submit JOB.yaml --address http://HEAD:8265, or run the driver on the cluster"
        )
    if address.startswith(("http://", "https://")):
        raise ClusterError(
            f"{name} {address!r} is the URL of a dashboard. To run the driver on that cluster: "
            f"psgd submit JOB.yaml --address {address}. To drive it from here, give HOST:PORT of its head, such as "
            "10.0.0.1:6379"
        )


def _split(name: str, address: str) -> tuple[str, int]:
    """Split HOST:PORT, where an IPv6 host stands in brackets."""
    try:
        parts = urlsplit(f"//{address}")
        host = parts.hostname
        port = parts.port
    except ValueError:
        host = port = None
    if not host or not port or parts.netloc != address or "@" in address:
        raise ClusterError(
            f"{name} {address!r}: expected HOST:PORT of a Ray head, such as 10.0.0.1:6379 or [fd00::1]:6379, or 'auto'"
        )
    return host, port


def check_listening(host: str, port: int, address: str) -> None:
    """Refuse an address where nothing listens.

    Raises:
        ClusterError: naming `address`.
    """
    try:
        socket.create_connection((host, port), CONNECT_S).close()
    except OSError as error:
        raise ClusterError(f"nobody answers at {address}: {error}. Is Ray's head up, and is the port right?") from error


def _speaks_http(host: str, port: int) -> bool:
    """Return True if a plain HTTP request is answered; Ray's head answers it with a frame of HTTP/2 and hangs up."""
    connection = HTTPConnection(host, port, timeout=CONNECT_S)
    try:
        connection.request("HEAD", "/")
        connection.getresponse()
    except (HTTPException, OSError):
        return False
    finally:
        connection.close()
    return True
