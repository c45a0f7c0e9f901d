"""The handshake: worker and server prove to each other that they belong to one run, before any frame is read.

The server greets with random bytes. The worker answers with its name, its layout, random bytes of its own and a keyed
hash of all of them. The server answers with a keyed hash of the worker's random bytes. Each server process has a new
key, which workers receive over Ray; the key itself is never sent over this connection.

    server → GREETING   magic, format, nonce
    worker → HELLO      incarnation, values, slots, shared, worker, nonce, HMAC-SHA256
    server → WELCOME    HMAC-SHA256          and, if memory is shared, the descriptor of the published weights
    worker → one byte                        only if memory is shared: with the descriptor of the worker's segment
    server → one byte                        only if memory is shared: the segment is mapped

Then the worker may send frames.
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
GREETING = Struct(f"<9sB{NONCE_SIZE}s")  # magic, format, nonce
FIELDS = Struct(f"<IQH?64s{NONCE_SIZE}s")  # of `Hello`, in their order
GREETING_SIZE = GREETING.size
HELLO_SIZE = FIELDS.size + PROOF_SIZE
WELCOME_SIZE = PROOF_SIZE


class Address(NamedTuple):
    """The address of a server, and the key that its workers need."""

    node: str  # Ray's id of the server's node
    path: str | None  # name of its Unix socket in Linux' abstract namespace; None: the server shares no memory
    host: str
    port: int | None  # None: the server does not listen on the network
    incarnation: int
    key: bytes

    def __repr__(self) -> str:
        return f"Address({self.node!r}, {self.path!r}, {self.host!r}, {self.port})"  # logs must not show the key


class Greeting(NamedTuple):
    """The server's first message."""

    nonce: bytes

    @classmethod
    def new(cls) -> Greeting:
        """Return a greeting with new random bytes."""
        return cls(secrets.token_bytes(NONCE_SIZE))

    def pack(self) -> bytes:
        """Return the message."""
        return GREETING.pack(MAGIC, FORMAT, self.nonce)

    @classmethod
    def unpack(cls, data: bytes) -> Greeting:
        """Read the message, `GREETING_SIZE` bytes.

        Raises:
            FrameError: the sender is no psgd server of this format.
        """
        magic, form, nonce = GREETING.unpack(data)
        if (magic, form) != (MAGIC, FORMAT):
            raise FrameError(f"the server is no psgd server of format {FORMAT}: it greets with {magic!r} {form}")
        return cls(nonce)


class Hello(NamedTuple):
    """The worker's first message: its name, and the size of its memory."""

    incarnation: int  # incarnation of the server that the worker expects
    num_parameters: int  # values of the whole weights
    slots: int  # slots of the worker's segment: batches that it may have in hand
    shared: bool  # the worker shares its segment
    worker: str
    nonce: bytes

    @classmethod
    def new(cls, incarnation: int, num_parameters: int, slots: int, shared: bool, worker: str) -> Hello:
        """Return a message with new random bytes; see the fields for the arguments."""
        return cls(incarnation, num_parameters, slots, shared, worker, secrets.token_bytes(NONCE_SIZE))

    def pack(self, key: bytes, greeting: Greeting) -> bytes:
        """Return the message, which ends with a proof that the worker has the key."""
        *numbers, worker, nonce = self
        fields = FIELDS.pack(*numbers, worker.encode(), nonce)
        return fields + proof(key, b"worker", greeting.nonce, fields)

    @classmethod
    def unpack(cls, data: bytes, key: bytes, greeting: Greeting) -> Hello:
        """Check the proof, then read the message.

        Raises:
            FrameError: the sender does not have the key.
            UnicodeDecodeError: the worker's name is not UTF-8.
        """
        fields = data[: FIELDS.size]
        if not hmac.compare_digest(data[FIELDS.size :], proof(key, b"worker", greeting.nonce, fields)):
            raise FrameError("the worker does not have this run's key")
        incarnation, num_parameters, slots, shared, worker, nonce = FIELDS.unpack(fields)
        return cls(incarnation, num_parameters, slots, shared, worker.rstrip(b"\0").decode(), nonce)

    def welcome(self, key: bytes) -> bytes:
        """Return the server's answer: its proof that it has the key too."""
        return proof(key, b"server", self.nonce)

    def frame_keys(self, key: bytes, greeting: Greeting) -> tuple[bytes, bytes]:
        """Return the keys of the tags of frames on this connection: of those to the server, and of those to the worker.

        Args:
            key: the run's key.
            greeting: the server's greeting in this handshake.
        """
        nonces = greeting.nonce + self.nonce
        return proof(key, b"pushes", nonces), proof(key, b"answer", nonces)


def proof(key: bytes, *parts: bytes) -> bytes:
    """Return the HMAC-SHA256 of the parts, joined. Only the last part may vary in length."""
    return hmac.digest(key, b"".join(parts), "sha256")
