from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from psgd_workers.transport.streams import limit, receive, send, shut

LIMIT_S = 10.0
MUCH = 2**22  # bytes: more than the buffers of a socket hold


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        for end in (one, other):
            limit(end, LIMIT_S)
        yield one, other


Pair = tuple[socket.socket, socket.socket]


def test_what_no_buffer_holds_arrives_whole_and_in_order(pair: Pair) -> None:
    one, other = pair
    parts: list[bytes | memoryview] = [b"head", memoryview(bytes(range(256)) * (MUCH // 256)), b"", b"tail"]
    into = bytearray(4 + MUCH + 4)
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send, one, *parts)
        assert receive(other, memoryview(into)) == len(into)
        sending.result(LIMIT_S)
    assert bytes(into) == b"".join(parts)


def test_who_hangs_up_early_is_told_by_the_number_of_bytes(pair: Pair) -> None:
    one, other = pair
    send(one, b"half")
    one.close()
    into = bytearray(8)
    assert receive(other, memoryview(into)) == 4
    assert bytes(into) == b"half\0\0\0\0"
    assert receive(other, memoryview(into)) == 0


def test_no_wait_is_longer_than_its_limit(pair: Pair) -> None:
    one, other = pair
    limit(one, 0.02)
    with pytest.raises(BlockingIOError):
        receive(one, memoryview(bytearray(1)))
    with pytest.raises(BlockingIOError):
        send(one, bytes(MUCH))
    limit(one, None)
    send(other, b"x")
    assert receive(one, memoryview(bytearray(1))) == 1


@pytest.mark.parametrize("end", [0, 1])
def test_shutting_ends_a_wait_at_either_end(pair: Pair, end: int) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(receive, pair[0], memoryview(bytearray(1)))
        shut(pair[end])
        assert waiting.result(LIMIT_S) == 0
    shut(pair[end])  # a second call does no harm
