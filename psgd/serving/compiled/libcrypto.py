"""OpenSSL's libcrypto: where it is, and a context of its AES-GCM for each direction of a connection."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from contextlib import suppress
from ctypes import c_char_p, c_int, c_void_p
from ctypes.util import find_library
from typing import Any
from weakref import finalize

import numpy as np

from psgd.serving.compiled.gmac import GmacArrays, add_bytes, begin_tag, end_tag
from psgd_workers.transport.authentication import TAG_SIZE, FrameAuthenticator

__all__ = ["Libcrypto"]

log = logging.getLogger("psgd.lanes")

KEY_SIZE = 32  # bytes
CALLED = ("EVP_EncryptInit_ex", "EVP_EncryptUpdate", "EVP_EncryptFinal_ex", "EVP_CIPHER_CTX_ctrl", "CRYPTO_memcmp")


class Libcrypto:
    """The functions of libcrypto that compute tags. Compiled code calls them by their addresses.

    With names instead of addresses, compiled code could not be loaded where Python has no libcrypto.

    Args:
        library: the loaded library.

    Raises:
        AttributeError: the library has not all of the functions.
    """

    def __init__(self, library: Any) -> None:
        self._addresses = [ctypes.cast(library[name], c_void_p).value for name in CALLED]
        self._new = library["EVP_CIPHER_CTX_new"]
        self._new.restype = c_void_p
        self._free = library["EVP_CIPHER_CTX_free"]
        self._free.argtypes = [c_void_p]
        self._free.restype = None
        self._begin = library["EVP_EncryptInit_ex"]
        self._begin.argtypes = [c_void_p, c_void_p, c_void_p, c_char_p, c_char_p]
        self._begin.restype = c_int
        self._cipher = library["EVP_aes_256_gcm"]
        self._cipher.restype = c_void_p

    @classmethod
    def find(cls) -> Libcrypto | None:
        """Return the libcrypto of Python's `hashlib`, else that of the system; None if neither computes right tags."""
        for path in _paths():
            try:
                found = cls(ctypes.CDLL(path))
                if found._is_right():
                    return found
                log.debug("%s computes other tags than Python", path)
            except (AttributeError, OSError, MemoryError) as error:
                log.debug("%s has no AES-GCM of OpenSSL: %s", path, error)
        return None

    def _is_right(self) -> bool:
        """Return True if compiled code computes the tag that Python computes."""
        authenticator = FrameAuthenticator(bytes(KEY_SIZE))
        gmac = self.gmac(authenticator)
        computed = begin_tag(gmac) and add_bytes(gmac, np.frombuffer(bytearray(b"frame"), np.uint8)) and end_tag(gmac)
        return computed and gmac.tag.tobytes() == authenticator.tag((b"frame",))

    def gmac(self, authenticator: FrameAuthenticator) -> GmacArrays:
        """Return what compiled code needs for the tags of one direction. Both count the same frames.

        The memory of libcrypto is freed together with the array `handles`.

        Args:
            authenticator: key and number of the next frame.
        """
        context = self._new()
        if not context:
            raise MemoryError("libcrypto cannot allocate a context for the tags of a connection")
        handles = np.array([context, *self._addresses])
        finalize(handles, self._free, context).atexit = False  # a thread may still use it then
        # The key is expanded once; each frame brings only its nonce.
        if self._begin(context, self._cipher(), None, authenticator.key, None) != 1:
            raise MemoryError("libcrypto cannot set up AES-GCM for the tags of a connection")
        return GmacArrays(handles, authenticator.nonce, np.zeros(TAG_SIZE, np.uint8), np.zeros(1, np.int32))


def _paths() -> Iterator[str | None]:
    """Yield where the functions may be. None is the interpreter's own program, of which `_hashlib` may be a part."""
    with suppress(ImportError):  # raised by a Python without OpenSSL
        import _hashlib

        yield getattr(_hashlib, "__file__", None)
    yield find_library("crypto")  # only if it is needed, because it starts processes
