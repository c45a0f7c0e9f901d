"""How a worker and a server prove to each other that they belong to one run, before anything else is read.

The server greets with random bytes; the worker answers with who it is, random bytes of its own, and a keyed hash of
all that; the server answers with a keyed hash of its own. The key, new for each server process, reaches workers over
Ray, and never travels here.

    server → GREETING   magic, format, nonce
    worker → HELLO      incarnation, values, slots, worker, shared, nonce, HMAC-SHA256
    server → WELCOME    HMAC-SHA256          with the published weights' descriptor, if shared
    worker → one byte                        with its segment's descriptor, if shared
    server → one byte                        it is mapped: frames may come
"""

from __future__ import annotations

import hmac
import secrets
from struct import Struct
from typing import NamedTuple

from psgd_workers.errors import FrameError

__all__ = ["GREETING_SIZE", "HELLO_SIZE", "KEY_SIZE", "WELCOME_SIZE", "Address", "Greeting", "Hello", "proof"]

MAGIC = b"psgd-lane"
FORMAT = 1
KEY_SIZE = NONCE_SIZE = PROOF_SIZE = 32
GREETING = Struct(f"<9sB{NONCE_SIZE}s")
FACTS = Struct(f"<IQH?64s{NONCE_SIZE}s")
GREETING_SIZE = GREETING.size
HELLO_SIZE = FACTS.size + PROOF_SIZE
WELCOME_SIZE = PROOF_SIZE


class Address(NamedTuple):
    """Where a server listens."""

    node: str  # Ray's id
    path: str | None  # name of its Unix socket, in Linux' abstract namespace; None: it shares no memory
    host: str
    port: int | None  # None: it listens on no network
    incarnation: int
    key: bytes

    def __repr__(self) -> str:
        return f"Address({self.node!r}, {self.path!r}, {self.host!r}, {self.port})"  # keys get into no log


class Greeting(NamedTuple):
    """The server's first words."""

    nonce: bytes

    @classmethod
    def new(cls) -> Greeting:
        return cls(secrets.token_bytes(NONCE_SIZE))

    def pack(self) -> bytes:
        return GREETING.pack(MAGIC, FORMAT, self.nonce)

    @classmethod
    def unpack(cls, data: bytes) -> Greeting:
        magic, form, nonce = GREETING.unpack(data)
        if (magic, form) != (MAGIC, FORMAT):
            raise FrameError(f"who listens there greets with {magic!r} {form}: no psgd server of format {FORMAT}")
        return cls(nonce)


class Hello(NamedTuple):
    """Who a worker is, and what its memory looks like."""

    incarnation: int  # of the server it expects
    num_parameters: int  # of the whole weights
    slots: int  # batches in hand
    shared: bool  # whether it passes its memory on
    worker: str
    nonce: bytes

    @classmethod
    def new(cls, incarnation: int, num_parameters: int, slots: int, shared: bool, worker: str) -> Hello:
        return cls(incarnation, num_parameters, slots, shared, worker, secrets.token_bytes(NONCE_SIZE))

    def pack(self, key: bytes, greeting: Greeting) -> bytes:
        """With the proof that its sender has the key."""
        *numbers, worker, nonce = self
        fields = FACTS.pack(*numbers, worker.encode(), nonce)
        return fields + proof(key, b"worker", greeting.nonce, fields)

    @classmethod
    def unpack(cls, data: bytes, key: bytes, greeting: Greeting) -> Hello:
        """Check, then read.

        Raises:
            FrameError: the sender does not have the key.
        """
        fields = data[: FACTS.size]
        if not hmac.compare_digest(data[FACTS.size :], proof(key, b"worker", greeting.nonce, fields)):
            raise FrameError("a peer without this run's key")
        incarnation, num_parameters, slots, shared, worker, nonce = FACTS.unpack(fields)
        return cls(incarnation, num_parameters, slots, shared, worker.rstrip(b"\0").decode(), nonce)

    def welcome(self, key: bytes) -> bytes:
        """The server's proof that it has the key too."""
        return proof(key, b"server", self.nonce)


def proof(key: bytes, *parts: bytes) -> bytes:
    """HMAC-SHA256 of the parts, of which none but the last may vary in length."""
    return hmac.digest(key, b"".join(parts), "sha256")
