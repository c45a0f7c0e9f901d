"""Whole messages over blocking stream sockets."""

from __future__ import annotations

import socket
from contextlib import suppress
from struct import pack

__all__ = ["limit", "receive", "send", "shut"]

SECOND = 1_000_000  # microseconds


def limit(stream: socket.socket, timeout_s: float | None) -> None:
    """Set the time limit of later calls, which raise BlockingIOError when it is over.

    This is the kernel's limit (SO_RCVTIMEO, SO_SNDTIMEO). Unlike `socket.settimeout`, it adds no system call to each
    transfer.

    Args:
        stream: socket to limit.
        timeout_s: seconds that a call may wait; None: without limit, until the connection is closed.
    """
    seconds, rest = divmod(0 if timeout_s is None else max(1, round(timeout_s * SECOND)), SECOND)
    timeval = pack("@ll", seconds, rest)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)


def send(stream: socket.socket, *parts: bytes | bytearray | memoryview) -> None:
    """Send all parts, one after the other.

    Raises:
        OSError: sending failed, or its time limit is over.
    """
    sent = stream.sendmsg(parts)
    for part in parts:
        if sent < len(part):
            stream.sendall(memoryview(part)[sent:])
        sent = max(0, sent - len(part))


def receive(stream: socket.socket, into: memoryview) -> int:
    """Receive bytes until `into` is full.

    Args:
        stream: socket to read from.
        into: buffer to fill.

    Returns:
        The number of bytes received: fewer than `len(into)` if the other end closed the connection.

    Raises:
        OSError: receiving failed, or a time limit is over.
    """
    if not into:
        return 0
    got = count = stream.recv_into(into)
    while count and got < len(into):
        got += (count := stream.recv_into(into[got:]))
    return got


def shut(stream: socket.socket) -> None:
    """Shut a connection down, which ends every wait for it in all threads and at its other end.

    The caller still has to close it.
    """
    with suppress(OSError):  # the other end has closed the connection already
        stream.shutdown(socket.SHUT_RDWR)
