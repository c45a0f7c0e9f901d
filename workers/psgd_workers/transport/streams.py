"""Whole messages over stream sockets that block."""

from __future__ import annotations

import socket
from contextlib import suppress
from math import inf
from struct import pack
from time import monotonic

__all__ = ["limit", "receive", "send", "shut"]

SECOND = 1_000_000  # microseconds


def limit(stream: socket.socket, timeout_s: float | None) -> None:
    """How long the next calls may wait before they raise BlockingIOError; None: until the connection is closed.

    This is the kernel's own limit, which costs no extra call each time, as `socket.settimeout` does.
    """
    seconds, rest = divmod(0 if timeout_s is None else max(1, round(timeout_s * SECOND)), SECOND)
    timeval = pack("@ll", seconds, rest)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)


def send(stream: socket.socket, *parts: bytes | memoryview) -> None:
    """All of them, one after the other.

    Raises:
        OSError: the socket's, its time limit included.
    """
    sent = stream.sendmsg(parts)
    for part in parts:
        if sent < len(part):
            stream.sendall(memoryview(part)[sent:])
        sent = max(0, sent - len(part))


def receive(stream: socket.socket, into: memoryview, rest_s: float | None = None) -> int:
    """Fill `into`.

    Args:
        stream: to read.
        into: filled from its beginning.
        rest_s: seconds that more may take, once something is there; looked at when something comes.

    Returns:
        How many bytes came: fewer than there is room for, if the other end hung up.

    Raises:
        OSError: the socket's, its time limit included.
    """
    got = count = stream.recv_into(into)
    if got == len(into):  # the usual case
        return got
    deadline = inf if rest_s is None else monotonic() + rest_s
    while count and got < len(into):
        if monotonic() >= deadline:
            raise TimeoutError(f"the rest of a message did not come within {rest_s} s")
        got += (count := stream.recv_into(into[got:]))
    return got


def shut(stream: socket.socket) -> None:
    """End every wait for it, in all threads, here and at its other end; it is still to be closed."""
    with suppress(OSError):  # the other end has hung up already
        stream.shutdown(socket.SHUT_RDWR)
