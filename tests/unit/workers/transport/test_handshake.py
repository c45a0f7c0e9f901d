from __future__ import annotations

import secrets

import pytest

from psgd_workers.errors import FrameError
from psgd_workers.transport.handshake import (
    GREETING_SIZE,
    HELLO_SIZE,
    KEY_SIZE,
    WELCOME_SIZE,
    Address,
    Greeting,
    Hello,
)

KEY = bytes(range(KEY_SIZE))
OTHER_KEY = KEY[:-1] + b"\0"
GREETING = Greeting(bytes(32))
HELLO = Hello.new(3, 1000, 2, True, "worker-0")


def test_who_has_the_key_is_read_as_he_says_he_is() -> None:
    data = HELLO.pack(KEY, GREETING)
    assert len(data) == HELLO_SIZE
    assert Hello.unpack(data, KEY, GREETING) == HELLO


@pytest.mark.parametrize("worker", ["", "worker-0", "Ångström", "w" * 64])
def test_a_name_arrives_as_it_is(worker: str) -> None:
    hello = HELLO._replace(worker=worker)
    assert Hello.unpack(hello.pack(KEY, GREETING), KEY, GREETING) == hello


def test_a_greeting_is_read_as_it_was_written() -> None:
    greeting = Greeting.new()
    assert len(greeting.pack()) == GREETING_SIZE
    assert Greeting.unpack(greeting.pack()) == greeting


@pytest.mark.parametrize("place", [0, 8, 9])
def test_another_programs_greeting_is_refused(place: int) -> None:
    data = bytearray(GREETING.pack())
    data[place] ^= 1
    with pytest.raises(FrameError, match="no psgd server of format 1"):
        Greeting.unpack(bytes(data))


def test_a_peer_without_the_key_is_refused() -> None:
    with pytest.raises(FrameError, match="does not have this run's key"):
        Hello.unpack(HELLO.pack(OTHER_KEY, GREETING), KEY, GREETING)


def test_an_answer_to_another_greeting_is_refused() -> None:
    overheard = HELLO.pack(KEY, GREETING)
    with pytest.raises(FrameError, match="does not have this run's key"):
        Hello.unpack(overheard, KEY, Greeting.new())


def test_no_bit_of_an_answer_can_be_changed() -> None:
    data = HELLO.pack(KEY, GREETING)
    for place in range(HELLO_SIZE):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        with pytest.raises(FrameError, match="does not have this run's key"):
            Hello.unpack(bytes(changed), KEY, GREETING)


@pytest.mark.parametrize("length", [0, 1, HELLO_SIZE - 33, HELLO_SIZE - 32, HELLO_SIZE - 1, HELLO_SIZE + 1])
def test_an_answer_of_another_length_is_refused(length: int) -> None:
    data = HELLO.pack(KEY, GREETING) + b"\0"
    with pytest.raises(FrameError, match="does not have this run's key"):
        Hello.unpack(data[:length], KEY, GREETING)


def test_random_bytes_are_no_answer() -> None:
    with pytest.raises(FrameError, match="does not have this run's key"):
        Hello.unpack(secrets.token_bytes(HELLO_SIZE), KEY, GREETING)


def test_only_who_has_the_key_can_welcome_a_worker() -> None:
    welcome = HELLO.welcome(KEY)
    assert len(welcome) == WELCOME_SIZE
    assert welcome != HELLO.welcome(OTHER_KEY)
    assert welcome != HELLO._replace(nonce=secrets.token_bytes(32)).welcome(KEY), "a welcome is of one hello alone"
    assert welcome not in HELLO.pack(KEY, GREETING), "a worker's own proof is no welcome"


def test_a_worker_cannot_be_made_to_prove_what_a_server_proves() -> None:
    """A false server relays the nonce of another worker's hello, whose welcome it needs, as its own greeting."""
    relayed = HELLO.pack(KEY, Greeting(HELLO.nonce))
    assert HELLO.welcome(KEY) not in relayed


def test_nonces_are_never_the_same() -> None:
    assert len({Greeting.new().nonce for _ in range(100)} | {hello_nonce() for _ in range(100)}) == 200


def hello_nonce() -> bytes:
    return Hello.new(1, 1, 1, False, "worker-0").nonce


def test_an_address_gets_into_a_log_without_its_key() -> None:
    address = Address("node", "psgd-1", "10.0.0.1", 7000, 1, secrets.token_bytes(KEY_SIZE))
    assert f"{address}" == "Address('node', 'psgd-1', '10.0.0.1', 7000)"
    assert address.key.hex() not in f"{address!r}".lower()
    assert repr(address.key) not in f"{[address]}"
